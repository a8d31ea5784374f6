"""Hugging Face's Trainer by its own string, which this package serves: `python examples/trainer.py FOLDER`."""

import sys

import torch
from lowmem.optim.compat import install
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

install()  # without it "galore_adamw" asks for galore-torch

torch.manual_seed(0)
shape = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 176, "max_position_embeddings": 64}
model = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=2, num_attention_heads=4))
text = torch.tensor(list((torch.optim.AdamW.__doc__ or "").encode()))
rows = [{"input_ids": row, "labels": row} for row in text.unfold(0, 64, 16)]  # bytes, 64 a row

arguments = TrainingArguments(
    output_dir=sys.argv[1] if len(sys.argv) > 1 else "runs/trainer",
    optim="galore_adamw",
    optim_target_modules=["attn", "mlp"],
    optim_args="rank=16, update_proj_gap=50, projector=sketch",  # every option of GaLoreAdamW
    learning_rate=1e-2,
    max_steps=20,
    logging_steps=5,
    report_to=[],
)
trainer = Trainer(model, arguments, train_dataset=rows)
trainer.train()
print(trainer.optimizer.optimizer.summary())
