"""The rules of the design that a machine can hold: layers, cycles, imports at start, sizes and names of files."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "dreamsr_cli"

LAYERS = (
    ("__init__", "errors", "progress", "config", "plain_data", "draws", "ranks"),
    (
        "images",
        "photo_pixels",
        "photo_decoding",
        "photo_metadata",
        "photo_encoders",
        "photo_writer",
        "resample",
        "colour",
        "tiling",
        "batch_choice",
        "text_buckets",
        "transfers",
        "cpu_precision",
        "multidiffusion",
        "shifted_tiling",
        "flow",
        "journal",
        "journal_files",
        "folder_lock",
        "weights",
        "weights_lock",
        "hub",
        "fetching",
        "repinning",
        "run_weights",
        "bundle_state",
        "caption_texts",
        "caption_journal",
        "device",
        "machine",
        "counting",
        "counting_bytes",
        "counting_pixels",
        "roofline",
        "bundle_sizes",
        "json_lines",
        "worker_pool",
        "overlap",
        "processes",
        "work_sharing",
        "helping",
    ),
    ("models",),
    (
        "prompts",
        "prompts_file",
        "prompts_schema",
        "prompt_fitting",
        "captioning",
        "tile_likeness",
        "canvas",
        "consistency",
        "blended",
        "grained",
        "sampler",
        "tile_work",
        "texts_ahead",
        "kept_control",
        "degradations",
        "losses",
    ),
    (
        "engine",
        "photo_compute",
        "photo_job",
        "residency",
        "settings",
        "looks",
        "memory_plan",
        "memory_choice",
        "prompts_in_use",
        "backoff",
        "phase_sharing",
        "planning",
        "workload",
        "planned_settings",
        "tile_choice",
        "control_room",
        "training",
        "evaluation",
    ),
    ("cli", "__main__"),
)
"""Modules and sub-packages by layer, lowest first; an import goes to the same layer or down."""

NO_TORCH = (
    "errors",
    "progress",
    "config",
    "plain_data",
    "draws",
    "ranks",
    "weights",
    "weights_lock",
    "hub",
    "fetching",
    "repinning",
    "machine",
    "counting",
    "counting_bytes",
    "counting_pixels",
    "roofline",
    "shifted_tiling",
    "bundle_sizes",
    "workload",
    "planned_settings",
    "planning",
    "memory_plan",
    "run_weights",
    "bundle_state",
    "overlap",
    "residency",
    "cli",
    "__main__",
)
"""Where importing a module must not import torch, not even in a round-about way."""


def modules(package: Path) -> dict[str, Path]:
    """Dotted names below the package ("cli.app", "models.__init__") and their files."""
    return {".".join(path.relative_to(package).with_suffix("").parts): path for path in sorted(package.rglob("*.py"))}


def imports(path: Path, known: dict[str, Path], *, at_start_only: bool = False) -> set[str]:
    """Modules of the package, and foreign top-level packages (with a leading !), that a file imports."""
    found: set[str] = set()
    for node in _import_nodes(ast.parse(path.read_text(encoding="utf-8")), at_start_only):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            assert not node.level, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] != "dreamsr_cli":
                found.add(f"!{parts[0]}")
                continue
            inner = parts[1:]
            while inner and ".".join(inner) not in known and ".".join([*inner, "__init__"]) not in known:
                inner = inner[:-1]
            dotted = ".".join(inner)
            found.add(dotted if dotted in known else ".".join([*inner, "__init__"]))
    return found


def _import_nodes(tree: ast.Module, at_start_only: bool) -> list[ast.Import | ast.ImportFrom]:
    todo: list[ast.AST] = [tree]
    nodes: list[ast.Import | ast.ImportFrom] = []
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            nodes.append(node)
        elif at_start_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            todo.extend(node.orelse if at_start_only else [*node.body, *node.orelse])
        else:
            todo.extend(ast.iter_child_nodes(node))
    return nodes


def layer_of(module: str) -> int:
    """Number of the module's layer; a module that the table doesn't know is an error."""
    top = module.split(".")[0]
    (layer,) = [number for number, names in enumerate(LAYERS) if top in names]
    return layer


def upward_imports(package: Path) -> list[str]:
    known = modules(package)
    return [
        f"{name} -> {other}"
        for name, path in known.items()
        for other in sorted(imports(path, known))
        if not other.startswith("!") and layer_of(other) > layer_of(name)
    ]


def find_cycle(package: Path) -> list[str]:
    """The modules of one import cycle, [] if there is none."""
    known = modules(package)
    graph = {name: {o for o in imports(path, known) if o in known} - {name} for name, path in known.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_every_module_has_a_layer():
    known = {name.split(".")[0] for name in modules(PACKAGE)}
    assert {"cli", "models", "errors"} <= known
    assert known <= {name for names in LAYERS for name in names}


def test_imports_never_go_up():
    assert upward_imports(PACKAGE) == []


def test_no_import_cycles():
    assert find_cycle(PACKAGE) == []


def test_the_checks_see_what_they_look_for(tmp_path):
    files = {
        "errors.py": "def late():\n    from dreamsr_cli.models import dit\n",
        "models/__init__.py": "",
        "models/dit.py": "import torch\nfrom dreamsr_cli.flow import mix\n",
        "flow.py": "from dreamsr_cli.tiling import x\n",
        "tiling.py": "def f():\n    import dreamsr_cli.flow\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    known = modules(tmp_path)
    assert upward_imports(tmp_path) == ["errors -> models.dit"]
    assert set(find_cycle(tmp_path)) == {"flow", "tiling"}
    assert imports(tmp_path / "models" / "dit.py", known) == {"!torch", "flow"}
    assert imports(tmp_path / "errors.py", known, at_start_only=True) == set()


def test_torch_is_not_imported_at_the_start_of_light_modules():
    known = modules(PACKAGE)
    for name, path in known.items():
        if name.split(".")[0] not in NO_TORCH:
            continue
        todo, seen = [name], set()
        while todo:
            here = todo.pop()
            seen.add(here)
            start = imports(known[here], known, at_start_only=True)
            assert not start & {"!torch", "!diffusers", "!transformers", "!peft"}, f"{path} reaches it through {here}"
            todo += [other for other in start if other in known and other not in seen]


def test_only_the_command_line_draws_on_the_screen():
    known = modules(PACKAGE)
    users = {name for name, path in known.items() if imports(path, known) & {"!rich", "!typer"}}
    assert users
    assert {name.split(".")[0] for name in users} == {"cli"}


@pytest.mark.parametrize("arguments", [["--help"], ["upscale", "--help"], ["--version"]])
def test_help_is_fast_and_without_torch(arguments):
    """Fast: less than twice the modules that typer itself needs. Seconds differ threefold between machines."""
    code = (
        "import sys, typer.rich_utils; typers = len(sys.modules)\n"
        "from dreamsr_cli.cli.app import run\n"
        f"code = run({arguments!r})\n"
        "heavy = {'torch', 'numpy', 'diffusers', 'transformers', 'pyvips'} & set(sys.modules)\n"
        "print(code, sorted(heavy), len(sys.modules) / typers, file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "dreamsr" in result.stdout
    status, heavy, ratio = result.stderr.strip().split("\n")[-1].split(" ", 2)
    assert (status, heavy) == ("0", "[]")
    assert float(ratio) < 2


def test_files_are_small_and_named_for_what_they_do():
    for name, path in modules(PACKAGE).items():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, name
        stem = path.stem if path.stem != "__init__" else path.parent.name
        assert stem not in ("utils", "util", "common", "helpers", "misc") and not stem.startswith("base_"), name
