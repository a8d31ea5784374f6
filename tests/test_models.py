"""LLaMA configurations: shapes, vocabularies, types and bad files."""

import json

import pytest
import torch
from lowmem.bench.errors import UserError
from lowmem.bench.models import SHAPES, build_model, model_config
from transformers import LlamaForCausalLM

MILLIONS = {"tiny": 0.86, "9m": 9.05, "60m": 58.1, "130m": 134.1, "350m": 367.9, "1b": 1339.1, "7b": 6738.4}


@pytest.mark.parametrize("name", SHAPES)
def test_named_shapes_have_the_papers_sizes(name):
    with torch.device("meta"):
        model = LlamaForCausalLM(model_config(name))
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert millions == pytest.approx(MILLIONS[name], rel=0.01)
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_a_named_shape_grows_its_vocabulary_to_the_data():
    assert model_config("tiny", 300).vocab_size == 300
    assert model_config("60m", 300).vocab_size == 32000
    assert model_config("60m", 32100).vocab_size == 32100
    assert model_config("tiny", max_length=4096).max_position_embeddings == 4096


def test_a_model_is_a_function_of_its_seed():
    first, second, other = (build_model("tiny", seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_bf16_weights_keep_fp32_rotary_frequencies():
    model = build_model("tiny", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


def test_checkpointing_changes_no_gradient():
    rows = torch.randint(256, (2, 17), generator=torch.Generator().manual_seed(0))
    gradients = []
    for checkpointing in (False, True):
        model = build_model("tiny", checkpointing=checkpointing)
        model(input_ids=rows).logits.float().logsumexp(-1).sum().backward()
        gradients.append(model.model.layers[0].mlp.up_proj.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no LLaMA configuration"),
        ("[1]", "is no LLaMA configuration"),
        ('{"model_type": "gpt2"}', "model_type is 'gpt2', it must be \"llama\""),
        (json.dumps({"model_type": "llama", "hidden_size": "wide"}), "is no LLaMA configuration"),
        (json.dumps({"model_type": "llama", "vocab_size": 100}), '"vocab_size": 256'),
        (json.dumps({"model_type": "llama", "max_position_embeddings": 8}), "--length 8 or less"),
    ],
)
def test_a_bad_config_is_refused(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError) as error:
        build_model(str(tmp_path), 256, max_length=16)
    assert message in str(error.value)


def test_a_config_that_cannot_be_built_is_refused(tmp_path):
    values = {"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4, "num_hidden_layers": 1}
    (tmp_path / "odd.json").write_text(json.dumps(values))
    with pytest.raises(UserError):
        build_model(str(tmp_path / "odd.json"))


def test_an_unknown_name_lists_the_choices():
    with pytest.raises(UserError, match="choose tiny, 9m, 60m, 130m, 350m, 1b, 7b, or give a config JSON"):
        build_model("60b")
