"""Converting state of `bitsandbytes.optim.AdamW8bit` into that of plain groups with `state_dtype="bnb8"`, and back.

    optimizer.load_state_dict(from_bitsandbytes(torch.load("adamw8bit.pt"), model.parameters()))

for an `optimizer = AdamW8bit(model.parameters(), state_dtype="bnb8")` of this package, or any other with plain groups;
and where the one of bitsandbytes shall go on:

    theirs.load_state_dict(to_bitsandbytes(optimizer.state_dict(), model.parameters()))

bitsandbytes itself is not needed. Both sides use the same 256 values and blocks of 256 entries; theirs run through the
flat tensor, ours begin anew with every row of the matrix (first dimension, rest). Where that is the same, with a
multiple of 256 columns, the codes are copied. Other tensors are decoded to fp32 and coded in the blocks of the other
side: an entry moves by at most half the distance of two neighbouring codes of its new block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..kernels.blockwise import DYNAMIC, Blocks, dequantise, dynamic_map, quantise_
from ..kernels.bnb import coincides
from .core.codec import SMALL, form_of, rows_and_columns

WRAPPED = "__bnb_optimizer_quant_state__"
"""Key under which recent releases of bitsandbytes put the state tensors of a parameter, to hide them from FSDP."""

MOMENTS = (("exp_avg", "1", True), ("exp_avg_sq", "2", False))
"""Our name, the digit of theirs, and whether it may be negative."""

SHARED = ("lr", "betas", "eps", "weight_decay", "initial_lr")
"""Options of a group that mean the same to both; the last is that of learning rate schedulers."""

StateDict = dict[str, Any]


def from_bitsandbytes(state_dict: Mapping[str, Any], params: ParamsT) -> StateDict:
    """Convert a state dict of bitsandbytes' AdamW8bit into one for plain groups with `state_dtype="bnb8"`.

    The codes are copied where the columns of the matrix (first dimension, rest) are a multiple of 256; otherwise they
    are decoded to fp32 and coded anew. Moments that only one side codes are decoded or coded: ours stay in fp32 in
    vectors and where rows have fewer than 16 entries, theirs in embeddings that were told `optim_bits=32`.

    Args:
        state_dict: What the `state_dict()` of `bitsandbytes.optim.AdamW8bit` returned. Of a parameter: `step`, `state1`
            and `state2` of its shape, `qmap1`, `qmap2` (256,), `absmax1`, `absmax2` (ceil(numel / 256),).
        params: The parameters, groups or (name, parameter) pairs, in the order of that optimizer; only shapes count.

    Returns:
        Of a parameter: `step` (), `exp_avg` and `exp_avg_sq` of its shape, `exp_avg_scale` and `exp_avg_sq_scale`
        (rows, ceil(cols / 256)) if it is coded. Groups keep lr, betas, eps and weight_decay.

    Raises:
        ValueError: The state is not that of AdamW8bit or belongs to other parameters; names the key.
    """
    groups = [_group(group, {"alpha": 0.0}) | {"state_dtype": "bnb8"} for group in state_dict["param_groups"]]
    state = {}
    for key, param, held in _paired(state_dict, params):
        theirs = {**held, **held.get(WRAPPED, {})}
        theirs.pop(WRAPPED, None)
        _check_theirs(theirs, param, f"of parameter {key!r}")
        state[key] = _ours(theirs, param)
    return {"state": state, "param_groups": groups}


def to_bitsandbytes(state_dict: Mapping[str, Any], params: ParamsT) -> StateDict:
    """Convert a state dict of plain groups with `state_dtype="bnb8"` into one for bitsandbytes' AdamW8bit.

    The codes are copied where the columns of the matrix (first dimension, rest) are a multiple of 256; otherwise they
    are decoded to fp32 and coded anew. Tensors of 4096 elements and more are coded in any case.

    Args:
        state_dict: What `state_dict()` returned, as `from_bitsandbytes` describes it.
        params: The parameters, groups or (name, parameter) pairs, in the order of that optimizer; only shapes count.

    Returns:
        A state dict that their AdamW8bit loads, of any release since 0.44.

    Raises:
        ValueError: AdamW8bit cannot go on from this state: a matrix is projected, or coded otherwise, or the rule is
            not AdamW; names the key.
    """
    neutral = {"state_dtype": "bnb8", "rule": "adamw", "compat": None, "maximize": False, "correct_bias": True}
    neutral |= {"stacked": False}
    groups = [
        _group(group, neutral) | {"alpha": 0.0, "t_alpha": None, "t_beta3": None}
        for group in state_dict["param_groups"]
    ]
    tables: dict[tuple[bool, torch.device], Tensor] = {}
    state = {}
    for key, param, held in _paired(state_dict, params):
        _check_ours(held, param, f"of parameter {key!r}")
        state[key] = _theirs(held, param, tables)
    return {"state": state, "param_groups": groups}


def _ours(theirs: Mapping[str, Any], param: Tensor) -> dict[str, Tensor]:
    ours = {"step": torch.tensor(float(theirs["step"]), dtype=torch.float32, device="cpu")}
    for name, digit, signed in MOMENTS:
        source = theirs[f"state{digit}"]
        if source.dtype == torch.uint8:
            source = Blocks(source.reshape(1, -1), theirs[f"absmax{digit}"].reshape(1, -1))
        found = _moved(source, rows_and_columns(param.shape) if _coded(param) else None, signed)
        if isinstance(found, Blocks):
            ours[f"{name}_scale"], found = found.scale, found.codes
        ours[name] = found.view(param.shape)
    return ours


def _theirs(ours: Mapping[str, Tensor], param: Tensor, tables: dict[tuple[bool, torch.device], Tensor]) -> StateDict:
    theirs: StateDict = {"step": int(ours["step"])}
    for name, digit, signed in MOMENTS:
        source: Blocks | Tensor = ours[name]
        if f"{name}_scale" in ours:
            source = Blocks(ours[name].reshape(rows_and_columns(param.shape)), ours[f"{name}_scale"])
        found = _moved(source, (1, param.numel()) if param.numel() >= SMALL else None, signed)
        if isinstance(found, Blocks):
            # A copy of our table, since bitsandbytes may write to it; one for all parameters, as bitsandbytes has it.
            place = signed, found.codes.device
            theirs[f"qmap{digit}"] = tables.setdefault(place, dynamic_map(signed, str(place[1])).clone())
            theirs[f"absmax{digit}"], found = found.scale.view(-1), found.codes
        theirs[f"state{digit}"] = found.view(param.shape)
    return theirs


def _coded(param: Tensor) -> bool:
    return form_of("exp_avg", param.shape, "bnb8") is not None


def _moved(source: Blocks | Tensor, shape: tuple[int, int] | None, signed: bool) -> Blocks | Tensor:
    """Code a moment in blocks of this shape, or return it in fp32 for None; equal blocks are copied."""
    if isinstance(source, Blocks) and shape is not None and coincides(source.codes.shape) and coincides(shape):
        return Blocks(source.codes.reshape(shape).clone(), source.scale.reshape(shape[0], -1).clone())
    values = dequantise(source, DYNAMIC, signed=signed) if isinstance(source, Blocks) else source.clone()
    if shape is None:
        return values
    codes = torch.empty(shape, dtype=torch.uint8, device=values.device)
    moved = Blocks(codes, values.new_empty(shape[0], DYNAMIC.scales(shape[1])))
    quantise_(moved, values.view(shape), DYNAMIC, signed=signed)
    return moved


def _paired(state_dict: Mapping[str, Any], params: ParamsT) -> Iterator[tuple[Any, Tensor, Mapping[str, Any]]]:
    """Every key of the state dict that has state, its parameter and its state."""
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    tensors = list(_flat(params))
    if len(keys) != len(tensors):
        raise ValueError(f"param_groups name {len(keys)} parameters, {len(tensors)} are given: pass the same ones")
    for key, param in zip(keys, tensors, strict=True):
        held = state_dict["state"].get(key)
        if held:
            yield key, param, held


def _flat(params: Iterable[Any]) -> Iterator[Tensor]:
    for entry in params:
        if isinstance(entry, dict):
            members = entry["params"]
            yield from _flat([members] if isinstance(members, Tensor) else members)
        else:
            yield entry[1] if isinstance(entry, tuple) else entry


def _group(group: Mapping[str, Any], neutral: Mapping[str, Any]) -> StateDict:
    """The options of a group that both packages have; the others must have the `neutral` value, which does nothing."""
    for name, value in neutral.items():
        if group.get(name, value) != value:
            raise ValueError(f"a group has {name}={group[name]!r}, AdamW8bit only {value!r}")
    if len(group["betas"]) != 2 or not isinstance(group["eps"], (int, float)):
        raise ValueError(f"a group has betas={group['betas']} and eps={group['eps']}: AdamW has two and one number")
    kept = {name: group[name] for name in (*SHARED, "param_names") if name in group}
    return {**kept, "betas": tuple(group["betas"]), "params": list(group["params"])}


def _check_theirs(held: Mapping[str, Any], param: Tensor, owner: str) -> None:
    """Refuse what AdamW8bit does not keep."""
    coded = getattr(held.get("state1"), "dtype", None) == torch.uint8
    needed = {"step", "state1", "state2"} | ({"qmap1", "qmap2", "absmax1", "absmax2"} if coded else set())
    _check_keys(held, needed, owner, "bitsandbytes.optim.AdamW8bit, without percentile clipping or max_unorm,")
    for _, digit, signed in MOMENTS:
        name = f"state{digit}"
        if getattr(held[name], "is_paged", False):
            raise ValueError(f"{name} {owner} is paged: load it into AdamW8bit first, and convert the state of that")
        _check_tensor(held, name, torch.uint8 if coded else torch.float32, tuple(param.shape), owner)
        if not held[name].is_contiguous():
            raise ValueError(f"{name} {owner} has strides {held[name].stride()}: its order is that of other weights")
        if coded:
            blocks = DYNAMIC.scales(param.numel())
            _check_tensor(held, f"absmax{digit}", torch.float32, (blocks,), owner)
            _check_tensor(held, f"qmap{digit}", torch.float32, (256,), owner)
            table = held[f"qmap{digit}"]
            if not torch.allclose(table, dynamic_map(signed, str(table.device)), rtol=1e-5, atol=0.0):
                raise ValueError(f"qmap{digit} {owner} is not the dynamic map of AdamW8bit")


def _check_ours(held: Mapping[str, Any], param: Tensor, owner: str) -> None:
    """Refuse what AdamW8bit cannot go on from."""
    coded = _coded(param)
    scales = {f"{name}_scale" for name, _, _ in MOMENTS} if coded else set()
    _check_keys(held, {"step", "exp_avg", "exp_avg_sq"} | scales, owner, 'a plain group with state_dtype="bnb8"')
    rows, cols = rows_and_columns(param.shape)
    for name, _, _ in MOMENTS:
        _check_tensor(held, name, torch.uint8 if coded else torch.float32, tuple(param.shape), owner)
        if coded:
            _check_tensor(held, f"{name}_scale", torch.float32, (rows, DYNAMIC.scales(cols)), owner)


def _check_keys(held: Mapping[str, Any], needed: set[str], owner: str, keeper: str) -> None:
    missing, unknown = sorted(needed - held.keys()), sorted(held.keys() - needed)
    if missing or unknown:
        wrong = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has {', '.join(unknown)}"] * bool(unknown)
        raise ValueError(f"the state {owner} {' and '.join(wrong)}: {keeper} keeps {sorted(needed)}")


def _check_tensor(held: Mapping[str, Any], name: str, dtype: torch.dtype, shape: tuple[int, ...], owner: str) -> None:
    value = held[name]
    if value.dtype != dtype or tuple(value.shape) != shape:
        hint = ": its blocks are not of 256 entries" if name.startswith("absmax") else ""
        raise ValueError(
            f"{name} {owner} is {value.dtype} of shape {tuple(value.shape)}, not {dtype} of shape {shape}{hint}"
        )
