"""Real packages, end to end on a small Llama: what `patch` does to their weights and files."""

import contextlib
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.pipelines import BITS, GROUP_SIZE, PIPELINES, Stopwatch, Weights, dequantized
from sapq_triton import patch

from .conftest import GroupedError, needs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # theirs
]


def maybe(name: str, patched: bool, **options: Any) -> Any:
    return patch(name, **options) if patched else contextlib.nullcontext()


@pytest.mark.parametrize("name", [name for name in PIPELINES if name != "auto_round"])  # minutes
def test_layer_errors_are_lower(
    name: str, folder: Path, calibration: Tensor, errors: GroupedError
) -> None:
    needs(name)
    found, seconds = [], []
    for patched in (False, True):
        torch.manual_seed(0)
        watch = Stopwatch()
        with maybe(name, patched):
            found.append(errors(PIPELINES[name](folder, BITS, calibration, watch)))
        seconds.append(watch.seconds)
    theirs, ours = found
    assert mean(ours.values()) < mean(theirs.values())
    assert min(seconds) > 0
    print(f"{name}: {mean(theirs.values()):.5f} -> {mean(ours.values()):.5f}")


# --- GPTQModel ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"desc_act": True},
        {"sym": False},
        {"desc_act": False, "act_group_aware": False, "group_size": -1},
        {"bits": 3, "mse": 2.4},
    ],
    ids=["desc-act", "asymmetric", "per-channel", "3-bits-mse"],
)
def test_gptqmodel_settings(
    settings: dict[str, Any], folder: Path, calibration: Tensor, errors: GroupedError,
    tmp_path: Path,
) -> None:  # fmt: skip
    needs("gptqmodel")
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in calibration]
    options = {"bits": BITS, "group_size": GROUP_SIZE, "sym": True} | settings
    found, logs = [], []
    for patched in (False, True):
        config = QuantizeConfig(offload_to_disk=False, **options)
        model = GPTQModel.load(str(folder), config, device="cpu", dtype=torch.float32)
        with maybe("gptqmodel", patched):
            logs.append(model.quantize(rows, batch_size=4)["gptq"])
        model.save(str(tmp_path / str(patched)))
        stored = GPTQModel.load(str(tmp_path / str(patched)), device="cpu", backend=BACKEND.TORCH)
        found.append(errors(dequantized(stored.model)))
    assert mean(found[1].values()) <= mean(found[0].values())
    size = options["group_size"]
    for module in stored.model.modules():
        if hasattr(module, "g_idx"):
            columns = torch.arange(len(module.g_idx))
            assert torch.equal(module.g_idx.long(), columns // (len(columns) if size < 0 else size))
    for theirs, ours in zip(*(sorted(log, key=key_of) for log in logs), strict=True):
        assert key_of(theirs) == key_of(ours)
        assert (ours["samples"], ours["damp"]) == (theirs["samples"], theirs["damp"])
        assert 0 < float(ours["loss"]) < 1.02 * float(theirs["loss"])
        assert float(ours["time"]) >= 0


def key_of(line: dict[str, str]) -> tuple[str, str]:
    return str(line["layer"]), line["module"]


def test_gptqmodel_keeps_modules_without_samples(folder: Path) -> None:
    needs("gptqmodel")
    from gptqmodel import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    layer = nn.Linear(64, 32)
    outcomes = []
    for patched in (False, True):
        with maybe("gptqmodel", patched):
            task = GPTQ(layer, QuantizeConfig(bits=4, group_size=32, offload_to_disk=False))
            task.quantizer.configure(perchannel=True)
            outcomes.append(task.quantize())
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert "fallback" in str(outcomes[1][5])


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Linear(64, 32), (3, 40, 64)),
        (nn.Conv1d(8, 6, 3), (5, 8, 30)),
        (nn.Conv2d(8, 6, 3, groups=2), (5, 8, 12, 12)),
        (nn.Linear(72, 32), (3, 40, 72)),  # the last group is short
    ],
    ids=["linear", "conv1d", "conv2d-groups", "ragged"],
)
def test_gptqmodel_layers(layer: nn.Module, shape: tuple[int, ...]) -> None:
    needs("gptqmodel")
    from gptqmodel import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    inputs, outcomes = torch.randn(shape), []
    for patched in (False, True):
        with maybe("gptqmodel", patched):
            config = QuantizeConfig(
                bits=4, group_size=32, offload_to_disk=False, act_group_aware=False, fallback=None
            )
            task = GPTQ(layer, config)
            task.quantizer.configure(perchannel=True)
            task.add_batch(inputs, layer(inputs))
            outcomes.append(task.quantize())
    theirs, ours = outcomes
    for a, b in zip(theirs[:4], ours[:4], strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
    assert torch.equal(theirs[3], ours[3])
    assert isinstance(ours[5], float) and ours[5] < theirs[5]
    assert ours[6:] == theirs[6:]


# --- optimum --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{"desc_act": True, "act_group_aware": False}, {"sym": False}],
    ids=["desc-act", "asymmetric"],
)
def test_optimum_settings(
    settings: dict[str, Any], folder: Path, calibration: Tensor, errors: GroupedError,
    tmp_path: Path,
) -> None:  # fmt: skip
    needs("optimum")
    needs("gptqmodel")
    from optimum.gptq import GPTQQuantizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = []
    for patched in (False, True):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        rows = [
            {"input_ids": row[None], "attention_mask": torch.ones_like(row[None])}
            for row in calibration
        ]
        quantizer = GPTQQuantizer(
            bits=BITS, dataset=rows, group_size=GROUP_SIZE, model_seqlen=64, **settings
        )
        with maybe("optimum", patched):
            model = quantizer.quantize_model(model, AutoTokenizer.from_pretrained(folder))
        found.append(errors(dequantized(model)))
        assert model(calibration[:1]).logits.isfinite().all()
    assert mean(found[1].values()) < mean(found[0].values())
    quantizer.dataset = model.config.quantization_config["dataset"] = None  # it cannot write it
    before = dequantized(model)  # saving changes the model
    quantizer.save(model, str(tmp_path))
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    from gptqmodel import BACKEND, GPTQModel

    stored = GPTQModel.load(str(tmp_path), device="cpu", backend=BACKEND.TORCH)
    after = dequantized(stored.model)
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=1e-2, atol=1e-4)


def test_optimum_and_gptqmodel_share_a_class() -> None:
    needs("optimum")
    needs("gptqmodel")
    with patch("gptqmodel"), pytest.raises(ValueError, match="same function"):
        patch("optimum")
    with patch("optimum"):
        pass


# --- llm-compressor -------------------------------------------------------------------------------


def one_shot(folder: Path, calibration: Tensor, scheme: str, **settings: Any) -> nn.Module:
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows: Any = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in calibration]
    oneshot(
        model=model,
        processor=AutoTokenizer.from_pretrained(folder),
        dataset=DataLoader(rows, batch_size=1),
        recipe=GPTQModifier(targets="Linear", scheme=scheme, ignore=["lm_head"], **settings),
        num_calibration_samples=len(calibration),
        pipeline="sequential",
    )
    return model


def weights_of(model: nn.Module) -> Weights:
    return {
        name: module.weight.detach().float().clone()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and hasattr(module, "weight_scale")
    }


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "W8A8"])
def test_llmcompressor_schemes(
    scheme: str, folder: Path, calibration: Tensor, errors: GroupedError, tmp_path: Path
) -> None:
    needs("llmcompressor")
    from transformers import AutoModelForCausalLM

    found = []
    for patched in (False, True):
        with maybe("llmcompressor", patched):
            model = one_shot(folder, calibration, scheme)
        found.append(errors(weights_of(model)))
    assert mean(found[1].values()) < mean(found[0].values())
    if scheme != "W8A8":  # whose activations are quantized on the way, too
        before = model(calibration[:2]).logits
        model.save_pretrained(tmp_path, save_compressed=True)
        stored = AutoModelForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(
            stored(calibration[:2]).logits.float(), before, rtol=0, atol=1e-3
        )


@pytest.mark.parametrize("scheme, actorder", [("W4A16", "static"), ("W4A16_ASYM", None)])
def test_llmcompressor_block_level_changes_nothing_but_the_time(
    scheme: str, actorder: str | None, folder: Path, calibration: Tensor
) -> None:
    needs("llmcompressor")
    from llmcompressor.modifiers.gptq import gptq_quantize

    found, calls = [], []
    for patched in (False, True):
        seen = []
        with maybe("llmcompressor", patched, **({"level": "block"} if patched else {})):
            eager = gptq_quantize.fake_quantize

            def counted(*args: Any, eager: Any = eager, seen: Any = seen, **kwargs: Any) -> Any:
                seen.append(1)
                return eager(*args, **kwargs)

            gptq_quantize.fake_quantize = counted
            try:
                model = one_shot(folder, calibration, scheme, actorder=actorder)
            finally:
                gptq_quantize.fake_quantize = eager
        found.append(weights_of(model))
        calls.append(len(seen))
    assert calls[0] > 0 and calls[1] == 0  # their loop over columns never ran
    same = [torch.isclose(w, found[1][name], atol=1e-6) for name, w in found[0].items()]
    assert torch.cat([each.flatten() for each in same]).float().mean() > 0.999


def test_llmcompressor_keeps_floating_point_formats(folder: Path, calibration: Tensor) -> None:
    needs("llmcompressor")
    found = []
    for patched in (False, True):
        with maybe("llmcompressor", patched):
            found.append(weights_of(one_shot(folder, calibration, "NVFP4A16")))
    for name, weight in found[0].items():
        assert torch.equal(weight, found[1][name])


# --- Intel Neural Compressor ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{"act_order": True}, {"use_sym": False}, {"hybrid_order": True}, {"use_double_quant": True}],
    ids=lambda settings: "-".join(settings),
)
def test_neural_compressor_settings(
    settings: dict[str, Any], folder: Path, calibration: Tensor, errors: GroupedError
) -> None:
    needs("neural_compressor")
    from neural_compressor.torch.quantization import GPTQConfig, convert, prepare
    from transformers import AutoModelForCausalLM

    found = []
    for patched in (False, True):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model = prepare(model, GPTQConfig(bits=BITS, group_size=GROUP_SIZE, **settings))
        for row in calibration:
            model(row[None])
        with maybe("neural_compressor", patched):
            model = convert(model)
        assert model(calibration[:1]).logits.isfinite().all()
        weights = {
            name: module.recover().detach().float()
            for name, module in model.named_modules()
            if hasattr(module, "recover")
        }
        found.append(errors(weights))
    if "use_double_quant" in settings:
        assert found[0] == found[1]  # left alone
    else:
        assert mean(found[1].values()) < mean(found[0].values())


# --- ModelOpt -------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "INT8_WEIGHT_ONLY_CFG"])
def test_modelopt(config: str, folder: Path, calibration: Tensor, errors: GroupedError) -> None:
    needs("modelopt")
    import copy

    import modelopt.torch.quantization as mtq
    from transformers import AutoModelForCausalLM

    settings = copy.deepcopy(getattr(mtq, config))
    settings["algorithm"] = {"method": "gptq", "perc_damp": 0.01, "block_size": 128}
    found = []
    for patched in (False, True):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with maybe("modelopt", patched):
            mtq.quantize(model, settings, lambda m: [m(row[None]) for row in calibration])
        quantized = {
            name: module.weight_quantizer(module.weight).detach().float()
            for name, module in model.named_modules()
            if hasattr(module, "weight_quantizer") and module.weight_quantizer.is_enabled
        }
        for name, weight in quantized.items():  # what is stored lies on the grid already
            torch.testing.assert_close(weight, model.get_submodule(name).weight.detach())
        found.append(errors(quantized))
    assert mean(found[1].values()) < mean(found[0].values())


# --- torchao --------------------------------------------------------------------------------------


def test_torchao_int8(folder: Path, calibration: Tensor, errors: GroupedError) -> None:
    """Its own GPTQ needs a GPU: plain rounding to the same grid stands in for it."""
    needs("torchao")
    from torchao.prototype.gptq import GPTQConfig
    from torchao.quantization import Int8Tensor, Int8WeightOnlyConfig, quantize_
    from transformers import AutoModelForCausalLM

    def only(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and name != "lm_head"

    found = []
    for gptq in (False, True):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        base = Int8WeightOnlyConfig(version=2)
        if gptq:
            quantize_(model, GPTQConfig(step="observe", base_config=base), only)
            for row in calibration:
                model(row[None])
            with patch("torchao"):
                quantize_(model, GPTQConfig(step="convert", base_config=base), only)
        else:
            quantize_(model, base, only)
        tensors = {
            name: module.weight
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and isinstance(module.weight, Int8Tensor)
        }
        assert model(calibration[:1]).logits.isfinite().all()
        found.append(errors({name: w.dequantize().float() for name, w in tensors.items()}))
    assert mean(found[1].values()) < 0.95 * mean(found[0].values())


# --- AutoRound ------------------------------------------------------------------------------------


def test_auto_round_asymmetric_file(folder: Path, calibration: Tensor, tmp_path: Path) -> None:
    needs("auto_round")
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def outputs(place: Any) -> Tensor:
        with torch.no_grad():
            return AutoModelForCausalLM.from_pretrained(place)(calibration[:4]).logits.float()

    expected, distances = outputs(folder), []
    for algorithm in ("rtn", "sapq"):
        with maybe("auto_round", algorithm == "sapq"):
            rounder = AutoRound(
                AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
                AutoTokenizer.from_pretrained(folder), bits=BITS, group_size=32, sym=False,
                alg_configs=algorithm, dataset=[row[None] for row in calibration],
                seqlen=64, nsamples=16,
            )  # fmt: skip
            _, place = rounder.quantize_and_save(str(tmp_path / algorithm), format="auto_round")
        place = place[0] if isinstance(place, list | tuple) else place
        distances.append((outputs(place) - expected).square().mean().item())
    assert distances[1] < distances[0]
    with pytest.raises(ValueError, match="patch"):
        AutoRound(str(folder), alg_configs="sapq")
