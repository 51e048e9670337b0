"""What is seen of batches in the untouched model, and how it is put together."""

import pytest
import torch
from torch import Tensor, nn

from sapq_triton.first_pass import Observer, merge_visits
from sapq_triton.targets import Station


def stations(*names: str) -> dict[Station, int]:
    return {("solve", name): names.count(name) for name in names}


def test_new_stations_go_behind_the_one_before_them() -> None:
    batches = [stations("a", "d"), stations("a", "b", "c", "d", "b"), stations("e", "b", "c")]
    sequence, repeats = merge_visits(batches)
    assert [name for _, name in sequence] == ["e", "a", "b", "c", "d"]
    assert repeats == {("solve", n): 2 if n == "b" else 1 for n in "abcde"}


def test_observer() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).eval()
    layers, norms = {"0": model[0], "3": model[3]}, {"1": model[1]}
    observer = Observer(layers, norms, mask=lambda: None)
    for number, rows in ((7, 5), (2, 6)):
        observer.begin(number)
        model(torch.randn(rows, 3))
    assert list(observer.found) == [7, 2] and observer.outputs == {"0": 44, "3": 22}
    seen = observer.found[2]
    assert seen.visits == {("solve", "0"): 1, ("norm", "1"): 1, ("solve", "3"): 1}
    assert seen.follower == {"0": "1"} and seen.inputs == {"0": [0], "3": [1]}
    (moments,) = seen.moments[("norm", "1")]
    assert moments.number == 6 and moments.mean.shape == (4,)
    for hook in observer.hooks:
        hook.remove()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_norm_follows_what_nothing_has_changed() -> None:
    for between, follower in ((nn.Identity(), {"0": "2"}), (nn.ReLU(inplace=True), {})):
        model = nn.Sequential(nn.Linear(3, 4), between, nn.BatchNorm1d(4)).eval()
        observer = Observer({"0": model[0]}, {"2": model[2]}, mask=lambda: None)
        observer.begin(0)
        model(torch.randn(5, 3))
        model(torch.randn(0, 3))  # tells nothing of moments
        assert observer.found[0].follower == follower
        assert observer.found[0].visits == {("solve", "0"): 2, ("norm", "2"): 2}
        assert [m.number for m in observer.found[0].moments[("norm", "2")]] == [5]


def test_values_that_are_not_finite_are_named_where_they_count() -> None:
    layer, mask = nn.Linear(3, 2), torch.tensor([[True, False]])
    x = torch.randn(1, 2, 3)
    x[0, 1, 2] = torch.inf
    kept: list[Tensor | None] = [mask]
    observer = Observer({"layer": layer}, {}, mask=lambda: kept[0])
    observer.begin(0)
    layer(x)
    kept[0] = None
    with pytest.raises(ValueError, match="the input of 'layer'"):
        layer(x)


def test_an_output_that_is_not_finite_is_named() -> None:
    layer = nn.Linear(3, 2)
    nn.init.ones_(layer.weight)
    observer = Observer({"layer": layer}, {}, mask=lambda: None)
    observer.begin(0)
    with pytest.raises(ValueError, match=r"the output of 'layer' .* in torch\.float32"):
        layer(torch.full((1, 3), 3e38))
