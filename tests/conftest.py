import sys
from pathlib import Path

import torch

# `tests.reference` and `tests.cases` are imported from the repository root, which pytest's importlib mode leaves out.
sys.path.insert(0, str(Path(__file__).parent.parent))
# On shared cores the threads of one test wait for each other much longer than they work.
torch.set_num_threads(1)
