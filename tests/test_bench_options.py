"""Options of an optimizer found in its constructor and parsed from text."""

import pytest
import torch
from lowmem.bench.errors import UserError
from lowmem.bench.optimizers import available, run_options, state_bytes
from lowmem.bench.options import Option, flags_to_texts, options_of, parse_options


class Base:
    def __init__(self, params, lr: float = 1e-3, *, rank: int | None = 4, kind: str | torch.dtype = "auto"): ...


class Preset(Base):
    def __init__(self, params, betas: tuple[float, float] = (0.9, 0.999), fast: bool = False, **options): ...


def parse(cls, **texts):
    return parse_options(cls.__name__, options_of(cls), texts)


def test_values_get_the_types_of_the_constructor():
    values = parse(Preset, betas="0.8,0.9", fast="true", lr="1e-2", rank="8", kind="bfloat16")
    assert values == {"betas": (0.8, 0.9), "fast": True, "lr": 1e-2, "rank": 8, "kind": torch.bfloat16}
    assert type(values["rank"]) is int
    assert parse(Preset, rank="none", kind="8bit") == {"rank": None, "kind": "8bit"}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"rnk": "4"}, "no option 'rnk'. Did you mean rank?"),
        ({"rank": "4.5"}, "--rank 4.5: it takes none or int"),
        ({"fast": "maybe"}, "true/false"),
        ({"betas": "a,b"}, "tuple"),
    ],
)
def test_bad_values_say_what_is_needed(texts, message):
    with pytest.raises(UserError) as error:
        parse(Preset, **texts)
    assert message in str(error.value)


def test_a_needed_option_is_asked_for():
    class Needy:
        def __init__(self, params, lr: float): ...

    with pytest.raises(UserError, match="needs --lr VALUE"):
        parse(Needy)


def test_flags_are_read_in_all_their_forms():
    words = ["--lr", "-1", "--update-gap=5", "--fast", "--no-slow", "--fused", "false", "--rank", "4"]
    options = {name: Option(name, None, kinds) for name, kinds in {"rank": (int,), "lr": (float,)}.items()}
    options |= {name: Option(name, False, (bool,)) for name in ("fast", "slow", "fused")}
    texts = flags_to_texts(words, options)
    assert texts == {"lr": "-1", "update_gap": "5", "fast": "true", "slow": "false", "fused": "false", "rank": "4"}


def test_every_optimizer_of_the_package_is_found():
    from lowmem import optim

    names = {name.lower() for name in optim.__all__ if isinstance(getattr(optim, name), type)}
    assert set(available()) >= {"adamw", "galore", "adafactor"}
    assert set(available()) <= names | {"adamw"}
    for name in available():
        assert "lr" in run_options(name)
        assert "seed" not in run_options(name)


def test_state_bytes_count_shared_storage_once():
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([weight])
    stacked = torch.zeros(2, 10)
    optimizer.state[weight] = {"a": stacked[0], "b": [stacked[1], {"c": torch.zeros(2)}], "step": 3}
    assert state_bytes(optimizer) == 4 * 20 + 4 * 2
