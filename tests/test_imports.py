"""Which file may import which: the dependency rule as a test."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNEL = {"codes", "launch", "rounding", "triangle"}
KERNEL_OUTSIDE = {"torch", "triton"}

# file -> modules of ours that it may import: nothing that knows models, files or devices' names
MAY_IMPORT = {
    "codebook": set(),
    "spec": {"codebook"},
    "window": set(),
    "finite": set(),
    "tile": set(),
    "reference": {"codebook", "packing", "window"},
    "ops": {"codebook", "reference", "packing", "window", "kernels"},
    "hessian": {"finite", "ops", "window"},
    "order": {"codebook", "ops", "spec", "hessian"},
    "memory": set(),
    "obq": {"codebook", "memory", "ops", "tile"},
    "result": {"codebook", "reference", "spec"},
    "scales": {"codebook", "reference", "spec"},
    "packing": set(),
    "preset": {"spec"},
    "refine": {"codebook", "hessian", "ops", "result", "tile"},
    "sparsity": {"codebook", "ops", "spec"},
    "tile_solver": {"codebook", "obq", "ops", "reference", "sparsity"},
    "grids": {"hessian", "memory", "ops", "scales", "spec"},
    "solver": {
        "codebook",
        "grids",
        "hessian",
        "memory",
        "obq",
        "ops",
        "order",
        "reference",
        "refine",
        "result",
        "scales",
        "sparsity",
        "spec",
        "tile",
        "tile_solver",
    },
    "regularize": {"hessian", "ops", "solver", "spec"},
    "knapsack": set(),
    "mixed": {"spec", "result", "ops", "hessian", "knapsack", "solver"},
    "allocate": {"spec", "report", "knapsack"},
    "columns": {"hessian", "spec"},
    "baseline": {"columns", "result", "solver"},
    "plain": set(),
    "machine": set(),
    "progress": set(),
    "report": {"columns", "plain", "result", "spec"},
    "charts": set(),
    "page": {"charts"},
    "report_html": {"charts", "page", "report"},
    "report_files": {"report", "report_html"},
    "compare": {"charts", "page", "report", "report_html"},
}  # fmt: skip
NUMPY = {"reference", "knapsack", "mixed", "allocate"}


def imports(path: Path) -> tuple[set[str], set[str]]:
    """Modules of this project and of others that a file imports, at any depth of its code."""
    ours, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            ours |= {node.module} if node.module else {alias.name for alias in node.names}
            continue
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        others |= set(names)
    return {name.split(".")[0] for name in ours}, others


def packages(names: set[str]) -> set[str]:
    """Top-level packages, without the standard library."""
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", sorted(ROOT.glob("kernels/*.py")), ids=lambda path: path.stem)
def test_kernels_know_tensors_and_triton(path: Path) -> None:
    ours, others = imports(path)
    assert ours <= KERNEL
    assert packages(others) <= KERNEL_OUTSIDE
    assert not any(name.startswith("torch.nn") for name in others)


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_imports_point_inward(name: str) -> None:
    ours, others = imports(ROOT / "sapq_triton" / f"{name}.py")
    assert ours <= MAY_IMPORT[name]
    allowed = {"numpy"} if name in NUMPY else {"tqdm"} if name == "progress" else set()
    assert packages(others) <= {"torch"} | allowed
    assert not any(other.startswith("torch.nn") for other in others)


def test_experts_know_tensors_alone() -> None:
    ours, others = imports(ROOT / "sapq_triton" / "experts.py")
    assert not ours and packages(others) <= {"torch"}


def test_targets_do_not_know_the_run() -> None:
    ours, others = imports(ROOT / "sapq_triton" / "targets.py")
    rooms = {"baseline", "calibrate", "experts", "finite", "hessian", "layers", "result", "spec"}
    assert ours <= rooms
    assert packages(others) <= {"torch"}


def test_scores_do_not_know_how_layers_were_solved() -> None:
    ours, others = imports(ROOT / "sapq_triton" / "scores.py")
    assert ours <= {"layers", "result"}
    assert packages(others) <= {"torch"}


def test_curves_do_not_know_budgets() -> None:
    """But for the form of what they return."""
    ours, others = imports(ROOT / "sapq_triton" / "curves.py")
    rooms = {"forward", "hessian", "layers", "result", "scores", "solver", "spec", "targets"}
    assert ours <= rooms | {"allocate", "finite"}
    assert packages(others) <= {"torch"}


def test_packed_layers_do_not_know_whole_models() -> None:
    ours, others = imports(ROOT / "sapq_triton" / "packed.py")
    assert ours <= {"layers", "ops", "packing", "reference", "spec"}
    assert packages(others) <= {"torch"}


@pytest.mark.parametrize("path", sorted(ROOT.glob("sapq_triton/dropin/*.py")), ids=lambda p: p.stem)
def test_dropins_know_one_layer(path: Path) -> None:
    ours, others = imports(path)
    inside = {file.stem for file in path.parent.glob("*.py")}
    solver = {"finite", "hessian", "layers", "obq", "ops", "reference", "result", "solver", "spec"}
    assert ours <= inside | solver
    assert packages(others) <= {"torch"}


FILES = ROOT / "sapq_triton" / "formats"
LANGUAGE_FILES = (
    "folder", "layer", "gptq", "compressed_tensors", "sapq", "reader", "writer", "job"
)  # fmt: skip


@pytest.mark.parametrize("name", LANGUAGE_FILES)
def test_files_know_packed_layers_and_no_package_of_others(name: str) -> None:
    """Not who made the codes; the packages of the extra `hf` are imported when they are needed."""
    ours, others = imports(FILES / f"{name}.py")
    rooms = {"experts", "layers", "packed", "packing", "spec"} | (
        {"report", "report_files"} if name == "writer" else set()
    )
    assert ours <= rooms | set(LANGUAGE_FILES)
    assert packages(others) <= {"torch"}


ONNX_FILES = {  # file -> modules of ours that it may import: the graph knows no modules
    "onnx_graph": set(),
    "onnx_module": {"onnx_graph"},
    "onnx_activations": {"onnx_graph", "onnx_module"},
    "onnx_calibration": {"onnx_graph"},
    "onnx": {"layers", "packed", "quantize", "report", "spec", "targets"},
}


@pytest.mark.parametrize("name", ONNX_FILES)
def test_onnx_graphs_do_not_know_the_method(name: str) -> None:
    ours, others = imports(FILES / f"{name}.py")
    inside = set(ONNX_FILES) - {"onnx"} if name == "onnx" else set()
    assert ours <= ONNX_FILES[name] | inside
    free = {"torch"} if name in ("onnx", "onnx_module") else set()
    extra = {"onnx", "onnxruntime", "onnxscript", "google", "PIL", "numpy"}
    assert packages(others) <= extra | free


def test_blocks_of_a_model_know_modules_alone() -> None:
    for name, rooms in (("forward", set()), ("stream", {"forward"})):
        ours, others = imports(ROOT / "sapq_triton" / f"{name}.py")
        assert ours <= rooms and packages(others) <= {"torch", "numpy"}


@pytest.mark.parametrize("name", ["plain", "charts", "page", "report_html", "compare"])
def test_pages_are_made_of_numbers(name: str) -> None:
    """And of nothing that would have to be installed beside the files that hold them."""
    _, others = imports(ROOT / "sapq_triton" / f"{name}.py")
    assert not packages(others)


def test_the_command_line_is_outermost() -> None:
    rooms = {
        "blockwise", "experts", "formats", "layers", "machine", "preset", "progress", "ranks",
        "report", "spec", "stream", "targets",
    }  # fmt: skip
    ours, others = imports(ROOT / "sapq_triton" / "language.py")
    assert ours <= rooms and packages(others) <= {"torch"}
    for path in ROOT.glob("sapq_triton/**/*.py"):
        if path.stem not in ("cli", "__main__", "__init__"):
            assert not imports(path)[0] & {"cli", "language"}, path


def imported_at_once(path: Path) -> set[str]:
    """Packages that importing a file imports: not those that its functions import."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names.add(node.module)
    return packages(names)


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("sapq_triton/integrations/*.py")), ids=lambda p: p.stem
)
def test_integrations_import_their_package_when_it_is_patched(path: Path) -> None:
    ours, _ = imports(path)
    inside = {file.stem for file in path.parent.glob("*.py")}
    assert ours <= inside | {"dropin", "hessian", "layers", "ops", "solver", "spec"}
    assert imported_at_once(path) <= {"torch"}


@pytest.mark.parametrize("path", sorted(ROOT.glob("sapq_triton/**/*.py")), ids=lambda p: p.stem)
def test_own_modules_are_imported_relatively(path: Path) -> None:
    """An absolute import of ours may find another installation, and escapes the tests above."""
    assert not packages(imports(path)[1]) & {"sapq_triton", "kernels"}
