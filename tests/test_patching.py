"""patch and unpatch: which functions of other packages give way to ours, when, and what is said.

Here no such package is installed; one of them is made up, with the functions that are replaced.
What the real packages make of it is in tests/peers.
"""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import sapq_triton
from sapq_triton import QuantSpec, patch, solve, unpatch
from sapq_triton.dropin import Quantizer
from sapq_triton.integrations import NAMES, patching

PACKAGE = "neural_compressor.torch.algorithms.weight_only"
THEIRS = """
class GPTQ:
    def fasterquant(
        self, W, blocksize=128, percdamp=0.01, groupsize=-1, act_order=False, hybrid_order=False,
        fp8_aware=False, static_groups=False,
    ):
        return "theirs", percdamp
"""


@pytest.fixture
def their_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The class of a made up neural-compressor-pt 3.10."""
    yield install(tmp_path, monkeypatch)
    patching._active.clear()


def install(
    folder: Path, monkeypatch: pytest.MonkeyPatch, code: str = THEIRS, version: str = "3.10"
) -> Any:
    for name in list(sys.modules):
        if name.partition(".")[0] == "neural_compressor":
            monkeypatch.delitem(sys.modules, name)
    place = folder.joinpath(*PACKAGE.split("."))
    place.mkdir(parents=True, exist_ok=True)
    for parent in (place, *list(place.relative_to(folder).parents)[:-1]):
        (folder / parent / "__init__.py").touch()
    (place / "gptq.py").write_text(code)
    about = folder / "neural_compressor_pt.dist-info"
    about.mkdir(exist_ok=True)
    (about / "METADATA").write_text(f"Name: neural-compressor-pt\nVersion: {version}\n")
    monkeypatch.syspath_prepend(folder)
    importlib.invalidate_caches()
    module = importlib.import_module(f"{PACKAGE}.gptq")
    for name in list(sys.modules):
        if name.partition(".")[0] == "neural_compressor":
            monkeypatch.setitem(sys.modules, name, sys.modules[name])
    return module.GPTQ


def task(kind: Any, columns: int = 24) -> Any:
    """Their object, as it stands before the call that is replaced."""
    made = kind()
    made.layer = torch.nn.Linear(columns, 6)
    x = torch.randn(100, columns) @ torch.randn(columns, columns)
    made.H = x.T @ x / 50
    made.quantizer = Quantizer()
    made.quantizer.configure(4, perchannel=True, sym=False)
    made.quantizer.dtype, made.quantizer.use_double_quant = "int", False
    return made


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(distribution: str) -> str:
        raise patching.PackageNotFoundError(distribution)

    monkeypatch.setattr(patching, "version", missing)
    with pytest.raises(ValueError, match=r"is not installed; known to work: \('\d+\.\d+'"):
        patch(name)
    assert not patching._active


def test_names_and_options_are_checked_first() -> None:
    with pytest.raises(ValueError, match="name must be one of"):
        patch("gptq")
    with pytest.raises(TypeError, match=r"unknown options \['blocksize'\]; legal are .*'block'"):
        patch("gptqmodel", blocksize=64)
    with pytest.raises(TypeError, match="level"):
        patch("gptqmodel", level="block")
    for option, message in (
        ({"order": "up"}, "order must be"),
        ({"damp": -1}, "damp must be"),
        ({"block": 0}, "block must be"),
        ({"starts": 0}, "starts must be"),
        ({"sweeps": -1}, "sweeps must be"),
        ({"rounds": 0.5}, "rounds must be"),
        ({"precision": "half"}, "precision must be"),
        ({"backend": "cuda"}, "backend must be"),
    ):
        with pytest.raises(ValueError, match=message):
            patch("gptqmodel", **option)
    with pytest.raises(ValueError, match="level must be one of"):
        patch("llmcompressor", level="layer")
    with pytest.raises(ValueError, match=r"leaves .* to llm-compressor, got \['order', 'damp'\]"):
        patch("llmcompressor", level="block", order="natural", damp=0.1)


def test_as_functions(their_class: Any) -> None:
    theirs = their_class.fasterquant
    assert repr(patch("neural_compressor", damp=0.1)).startswith("Patch('neural_compressor'")
    assert their_class.fasterquant is not theirs
    unpatch("neural_compressor")
    assert their_class.fasterquant is theirs


def test_as_a_context_manager(their_class: Any) -> None:
    theirs = their_class.fasterquant
    with sapq_triton.patch("neural_compressor", order="natural") as made:
        assert made.options.order == "natural"
        assert their_class.fasterquant is not theirs
    assert their_class.fasterquant is theirs
    with pytest.raises(KeyError), patch("neural_compressor"):
        raise KeyError
    assert their_class.fasterquant is theirs
    with patch("neural_compressor"):
        unpatch("neural_compressor")
        assert their_class.fasterquant is theirs


def test_an_inner_end_does_not_take_back_a_later_patch(their_class: Any) -> None:
    theirs = their_class.fasterquant
    with patch("neural_compressor"):
        unpatch("neural_compressor")
        later = patch("neural_compressor", order="natural")
    assert patching._active == {"neural_compressor": later}
    unpatch("neural_compressor")
    assert their_class.fasterquant is theirs


def test_twice_or_not_at_all(their_class: Any) -> None:
    with pytest.raises(ValueError, match=r"'neural_compressor' is not patched; patched are \[\]"):
        unpatch("neural_compressor")
    with patch("neural_compressor"):
        ours = their_class.fasterquant
        with pytest.raises(ValueError, match="patched already"):
            patch("neural_compressor")
        assert their_class.fasterquant is ours
    with pytest.raises(ValueError, match="not patched"):
        unpatch("neural_compressor")


def test_two_names_for_one_function(their_class: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from sapq_triton.integrations import neural_compressor, torchao

    monkeypatch.setattr(torchao, "swaps", neural_compressor.swaps)
    monkeypatch.setattr(torchao, "DISTRIBUTION", "neural-compressor-pt")
    with patch("neural_compressor"):
        ours = their_class.fasterquant
        with pytest.raises(ValueError, match="replace the same function"):
            patch("torchao", any_version=True)
        assert their_class.fasterquant is ours


def test_what_someone_else_put_there_is_not_overwritten(their_class: Any) -> None:
    theirs = their_class.fasterquant
    patch("neural_compressor")
    ours, third = their_class.fasterquant, lambda self: None
    their_class.fasterquant = third
    with pytest.raises(ValueError, match=r"GPTQ\.fasterquant was replaced by someone else"):
        unpatch("neural_compressor")
    assert their_class.fasterquant is third
    their_class.fasterquant = ours
    unpatch("neural_compressor")
    assert their_class.fasterquant is theirs


def test_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = install(tmp_path, monkeypatch, version="3.11.2")
    theirs = kind.fasterquant
    with pytest.raises(ValueError, match=r"3\.11\.2 was not tried .* known to work: \('3\.10',\)"):
        patch("neural_compressor")
    assert kind.fasterquant is theirs
    with patch("neural_compressor", any_version=True):
        assert kind.fasterquant is not theirs


@pytest.mark.parametrize("any_version", [False, True])
def test_signatures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, any_version: bool) -> None:
    code = THEIRS.replace("static_groups=False", "static_groups=False, more=1")
    kind = install(tmp_path, monkeypatch, code)
    theirs = kind.fasterquant
    with pytest.raises(ValueError, match=r"'more'.*this version is not known to work"):
        patch("neural_compressor", any_version=any_version)
    assert kind.fasterquant is theirs and not patching._active


def test_a_package_that_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch)
    monkeypatch.setitem(sys.modules, f"{PACKAGE}.gptq", None)
    with pytest.raises(ValueError, match="'neural_compressor' cannot be imported"):
        patch("neural_compressor")
    assert not patching._active


def test_damping_is_theirs_unless_it_is_chosen() -> None:
    assert patching.Options().for_solver(0.05)["damp"] == 0.05
    assert patching.Options(damp=0.2).for_solver(0.05)["damp"] == 0.2


@pytest.mark.parametrize("group_size", [-1, 8, 16])
@pytest.mark.parametrize("act_order", [False, True])
def test_neural_compressor(their_class: Any, group_size: int, act_order: bool) -> None:
    made = task(their_class)
    hessian, weight = made.H.clone(), made.layer.weight.data
    with patch("neural_compressor", order="activation"):
        scale, unused, zero, quantized = made.fasterquant(
            weight.clone(), percdamp=0.03, groupsize=group_size, act_order=act_order
        )
    groups = 1 if group_size == -1 else -(-24 // group_size)
    assert scale.shape == zero.shape == (6, groups) and unused.tolist() == [-1]
    assert not hasattr(made, "H")
    assert act_order == (getattr(made, "perm", torch.zeros(0)).tolist() == list(range(24)))
    if group_size != 16:  # of which the last is short
        spec = QuantSpec(4, group_size)
        grid = {"scale": scale, "zero_point": zero}
        expected = solve(weight, hessian, spec, order="activation", damp=0.03, **grid)
        assert torch.equal(quantized, expected.dequantize())


def test_options_reach_the_solver(their_class: Any) -> None:
    made = task(their_class)
    weight, hessian = made.layer.weight.detach().clone(), made.H.clone()
    options: dict[str, Any] = dict(order="sensitivity", block=8, starts=3, sweeps=1, rounds=2,
                                   damp=0.01, precision="ieee", backend="reference")  # fmt: skip
    with patch("neural_compressor", **options):
        scale, _, zero, quantized = made.fasterquant(made.layer.weight)
    expected = solve(weight, hessian, QuantSpec(4), scale=scale, zero_point=zero, **options)
    torch.testing.assert_close(quantized, expected.dequantize())
    for other in (dict(order="natural"), dict(starts=1), dict(sweeps=0), dict(rounds=0)):
        how = options | other
        changed = solve(weight, hessian, QuantSpec(4), scale=scale, zero_point=zero, **how)
        assert (changed.codes != expected.codes).any(), other


def test_neural_compressor_keeps_what_is_its_own(their_class: Any) -> None:
    made = task(their_class)
    with patch("neural_compressor"):
        assert made.fasterquant(made.layer.weight, fp8_aware=True)[0] == "theirs"
        made.quantizer.use_double_quant = True
        assert made.fasterquant(made.layer.weight, percdamp=0.5) == ("theirs", 0.5)
        made.quantizer.use_double_quant, made.quantizer.dtype = False, "nf4"
        assert made.fasterquant(made.layer.weight)[0] == "theirs"
