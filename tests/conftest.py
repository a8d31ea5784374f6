import os
import sys
from pathlib import Path

import torch

# `tests.reference` and `tests.cases` are imported from the repository root, which pytest's importlib mode leaves out.
sys.path.insert(0, str(Path(__file__).parent.parent))
# Triton's kernels run interpreted where there is no GPU; their decorator reads this when they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# On shared cores the threads of one test wait for each other much longer than they work.
torch.set_num_threads(1)
