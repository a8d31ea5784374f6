"""Which layers a name means: users' wrong names silently matched nothing, or too much."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lowmem.bench.models import build_model
from lowmem.optim import GaLore, GaLoreAdamW, head_groups, param_groups
from lowmem.optim.matched import matched
from torch import Tensor, nn
from transformers.trainer_utils import check_target_module_exists

from tests.helpers import randn


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 8)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp, self.norm = Attention(), nn.Linear(8, 16), nn.LayerNorm(8)


class Model(nn.Module):
    """Attention, MLP and norms, a convolution, an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.conv = nn.Conv2d(3, 8, 2)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.lm_head = nn.Linear(8, 20, bias=False)


ATTENTION = {f"layers.{i}.self_attn.{name}.weight" for i in range(2) for name in ("q_proj", "k_proj")}
MLP = {f"layers.{i}.mlp.weight" for i in range(2)}
NORMS = {f"layers.{i}.norm.weight" for i in range(2)}


def projected(model: nn.Module, groups: list[dict[str, Any]]) -> set[str]:
    return set(matched(model, groups).names("rank"))


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", ATTENTION | MLP),
        (r".*\.mlp", MLP),
        ("layers.0.mlp", {"layers.0.mlp.weight"}),
        (["attn", "mlp"], ATTENTION | MLP),
        (["q_proj"], {name for name in ATTENTION if "q_proj" in name}),
        (["layers.1.self_attn.k_proj"], {"layers.1.self_attn.k_proj.weight"}),
        ([r"layers\.\d+\.mlp", "lm_head"], MLP | {"lm_head.weight"}),
        (["conv"], {"conv.weight"}),
    ],
)
def test_targets_are_those_of_hugging_face(targets: str | list[str], expected: set[str]) -> None:
    model = Model()
    assert projected(model, param_groups(model, rank=4, targets=targets)) == expected


@pytest.mark.parametrize(
    "targets",
    [r".*attn.*", "mlp|head", ["attn", "mlp"], ["mlp$"], ["proj"], [r".*\.\d\.mlp"], ["lm_head"], ["layers.0"]],
)
def test_every_choice_is_that_of_transformers(targets: str | list[str]) -> None:
    model = build_model("tiny")
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    expected = {f"{name}.weight" for name in linears if check_target_module_exists(targets, name)}
    if expected:
        assert projected(model, param_groups(model, rank=4, targets=targets)) == expected
    else:
        with pytest.raises(ValueError, match="matches no linear layer"):
            param_groups(model, rank=4, targets=targets)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": "attn"}, r"'attn' matches no linear layer.*targets=\['attn'\] finds parts"),
        ({"targets": ["attn", "atention"]}, "'atention' matches no linear layer; there are layers.0"),
        ({"targets": ["norm"]}, "'norm' matches no linear layer"),
        ({"exclude": ["qproj"]}, "exclude 'qproj' matches none of layers.0"),
        ({"exclude": "k_proj"}, r"exclude=\['k_proj'\] finds parts"),
        ({"exclude": [".*"]}, "no trainable linear layer of Model is projected"),
        ({"rank": {"attn": 4, "mpl": 8}}, "rank pattern 'mpl' matches none of the layers left to it"),
        ({"rank": {"proj|": 4, "attn": 8, "mlp": 2}}, "rank pattern 'proj|' matches none"),
        ({"rank": {"attn": 4}}, r"no rank for layers\.0\.mlp, layers\.1\.mlp: add"),
        ({"rank": {"layers": 4}, "density": 0.25}, "pass one of the two"),
        ({"weight_decay_exclude": ["bais"]}, "weight_decay_exclude 'bais' matches none"),
    ],
)
def test_wrong_names_do_not_silently_match_nothing(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        param_groups(Model(), **arguments)


def test_names_that_match_too_much_are_seen_in_the_report() -> None:
    model = Model()
    report = matched(model, param_groups(model, rank=4, targets=["layers"], exclude=["k_proj"]))
    assert str(report).splitlines()[:2] == [
        "rank 4     2 x 8x8            layers.*.self_attn.q_proj.weight",
        "rank 4     2 x 16x8           layers.*.mlp.weight",
    ]
    assert set(report.names("plain")) == {name for name, _ in model.named_parameters()} - set(report.names("rank"))
    groups = [{"params": model.parameters()}]
    assert matched(model, [{"params": list(group["params"])} for group in groups]).names("rank") == []
    with pytest.raises(ValueError, match="group 0 holds a"):
        matched(model, [{"params": [nn.Parameter(torch.zeros(2))]}])


@pytest.mark.parametrize(
    ("cls", "options", "small"),
    [
        (GaLore, {"rank": 8}, "plain, rank 8 is too large"),
        (GaLore, {"rank": None, "density": 0.5}, "density 0.5"),
        (GaLoreAdamW, {"rank": 8}, "rank 8"),  # the authors' bases may be square
    ],
)
def test_the_report_tells_which_parameters_a_rank_leaves_plain(cls: Any, options: dict[str, Any], small: str) -> None:
    model = nn.Sequential(nn.Linear(32, 16), nn.LayerNorm(16), nn.Linear(16, 8))
    optimizer = cls([{"params": model.parameters(), **options}], lr=1e-2)
    report = matched(model, optimizer.param_groups)
    assert report.names(small)[-1] == "2.weight"
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    based = {name for name, param in model.named_parameters() if "basis" in optimizer.state[param]}
    assert based == {*report.names("rank"), *report.names("density")}


def test_excluded_layers_are_plain() -> None:
    model = Model()
    groups = param_groups(model, rank=4, exclude=["k_proj", r"layers\.0\.mlp"])
    kept = {name for name in ATTENTION | MLP if "k_proj" not in name} - {"layers.0.mlp.weight"}
    assert projected(model, groups) == kept
    every = [param for group in groups for param in group["params"]]
    assert len(every) == len({id(param) for param in every}) == len(list(model.parameters()))


def test_the_first_pattern_decides_a_rank() -> None:
    model = Model()
    groups = param_groups(model, rank={"layers.0.mlp": 2, "attn": 4, ".*": 3}, update_proj_gap=7)
    report = matched(model, groups)
    assert report.names("rank 2") == ["layers.0.mlp.weight"]
    assert set(report.names("rank 4")) == ATTENTION
    assert report.names("rank 3") == ["layers.1.mlp.weight"]
    assert [group["update_proj_gap"] for group in groups if "rank" in group] == [7, 7, 7]
    assert {row.rank for row in GaLore(groups).summary()} == {None, 2, 3, 4}


BIASES = {name for name, _ in Model().named_parameters() if name.endswith("bias")}


@pytest.mark.parametrize(
    ("exclude", "still"),
    [
        (None, set()),
        (True, BIASES | NORMS),
        (["bias", "norm"], BIASES | NORMS),
        (r"embed\..*", {"embed.weight"}),
        (lambda name, param: param.ndim < 2, BIASES | NORMS),
        (["mlp.weight"], MLP),
    ],
)
def test_what_does_not_decay_is_in_groups_of_its_own(
    exclude: bool | list[str] | Callable[[str, Tensor], bool] | None, still: set[str]
) -> None:
    model = Model()
    groups = param_groups(model, rank=4, weight_decay_exclude=exclude)
    names = {id(param): name for name, param in model.named_parameters()}
    assert {names[id(p)] for g in groups if g.get("weight_decay") == 0.0 for p in g["params"]} == still
    assert projected(model, groups) == ATTENTION | MLP
    optimizer = GaLore(groups, lr=0.1, weight_decay=0.5)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for name, param in model.named_parameters():
        moved = before[name] if name in still else 0.95 * before[name]
        torch.testing.assert_close(param.detach(), moved, rtol=1e-6, atol=0)


def test_a_swap_changes_no_decay() -> None:
    assert all("weight_decay" not in group for group in param_groups(Model(), rank=4))


def test_frozen_parameters_are_added_when_they_are_unfrozen() -> None:
    model = Model()
    model.layers[0].requires_grad_(False)
    optimizer = GaLore(param_groups(model, rank=4))
    assert all(name.startswith("layers.0.") for name in matched(model, optimizer.param_groups).names("frozen"))
    model.layers[0].requires_grad_(True)
    assert "layers.0.mlp.weight" in matched(model, optimizer.param_groups).names("in no group")
    optimizer.add_param_group({"params": [model.layers[0].mlp.weight], "rank": 4})
    assert "layers.0.mlp.weight" in matched(model, optimizer.param_groups).names("rank")


def test_a_shared_weight_is_projected_once_by_its_first_name() -> None:
    model = Model()
    model.layers[1].mlp = model.layers[0].mlp
    groups = param_groups(model, rank={"layers.0.mlp": 2, "attn": 4})
    assert matched(model, groups).names("rank 2") == ["layers.0.mlp.weight"]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_heads_take_ranks_and_decay_by_name() -> None:
    model = build_model("tiny")
    groups = head_groups(model, rank={"attn": 8, "mlp": 16}, weight_decay_exclude=True)
    heads = [group for group in groups if group.get("projector") == "cross_head"]
    assert [(group["rank"], group["num_heads"], len(group["params"])) for group in heads] == [(8, 4, 8)]
    assert {group["rank"] for group in groups if "rank" in group} == {8, 16}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


class Experts(nn.Module):
    """A fused mixture of experts: one matrix for every expert in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(randn(4, 16, 8)), nn.Parameter(randn(4, 8, 16))


def test_stacks_of_experts_are_projected_as_stacks() -> None:
    model = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "experts": Experts()})
    up, down = "experts.gate_up_proj", "experts.down_proj"
    report = matched(model, param_groups(model, rank=2))
    assert report.names("rank 2, stacked") == [up, down]
    assert "q_proj.weight" in report.names("rank 2")
    for targets, found in (
        (["experts"], [up, down]),
        (["q_proj", "gate_up_proj"], [up]),
        (r"experts\.down_proj", [down]),
    ):
        assert matched(model, param_groups(model, rank=2, targets=targets)).names("rank 2, stacked") == found
    ranks = {"gate_up": 3, ".*": 2}
    assert matched(model, param_groups(model, rank=ranks)).names("rank 3, stacked") == [up]
    report = matched(model, param_groups(model, rank=2, exclude=["experts"]))
    assert report.names("rank") == ["q_proj.weight"]
    assert {up, down} <= set(report.names("plain"))


def test_a_table_of_positions_is_no_stack_unless_it_is_named() -> None:
    model = nn.Module()
    model.proj, model.positions = nn.Linear(8, 8), nn.Parameter(randn(1, 16, 8))
    assert "positions" in matched(model, param_groups(model, rank=2)).names("plain")
    assert matched(model, param_groups(model, rank=2, targets=["positions"])).names("rank 2, stacked") == ["positions"]


@pytest.mark.parametrize(("name", "options"), [("Linear4bit", {}), ("Linear8bitLt", {"has_fp16_weights": False})])
def test_quantised_layers_of_bitsandbytes_are_skipped_with_a_reason(name: str, options: dict[str, Any]) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer = getattr(bnb.nn, name)(8, 8, **options)
    refuse_codes(nn.ModuleDict({"q_proj": layer, "lora_A": nn.Linear(8, 4), "norm": nn.LayerNorm(8)}))


def test_weights_of_bitsandbytes_that_can_be_trained_are_projected() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.ModuleDict({"q_proj": bnb.nn.Linear8bitLt(8, 8)})
    assert matched(model, param_groups(model, rank=2)).names("rank") == ["q_proj.weight"]


def test_quantised_layers_of_other_packages_are_skipped_with_a_reason() -> None:
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    refuse_codes(nn.ModuleDict({"q_proj": layer, "lora_A": nn.Linear(8, 4)}))
    packed = nn.Module()
    packed.register_buffer("qweight", torch.zeros(1, 8, dtype=torch.int32))
    model = nn.ModuleDict({"q_proj": packed, "lora_A": nn.Linear(8, 4)})
    with pytest.raises(ValueError, match="quantised ones, q_proj"):
        param_groups(model, rank=2, targets=["q_proj"])


def refuse_codes(model: nn.ModuleDict) -> None:
    report = matched(model, param_groups(model, rank=2))
    assert report.names("rank") == ["lora_A.weight"]
    assert report.names("quantised") == ["q_proj.weight"]
    with pytest.raises(ValueError, match=re.escape('targets=["lora_A", "lora_B"]')):
        param_groups(model, rank=2, targets=["lora_A", "q_proj"])
    del model["lora_A"]
    with pytest.raises(ValueError, match="q_proj are quantised, and no optimizer can train codes"):
        param_groups(model, rank=2)
