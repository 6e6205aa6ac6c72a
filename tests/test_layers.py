"""Modules of rlhf import only from their own layer or below, and nothing from data/, stages/ or tests/."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT_DIR = Path(__file__).resolve().parents[1]

# the first name after `rlhf.`; a folder is one entry
LAYERS = {
    "numerics": 0,
    "settings": 1,
    "validation": 1,
    "specs": 1,
    "gates": 1,
    "config": 1,
    "batches": 1,
    "checks": 1,
    "workers": 1,
    "interrupts": 1,
    "sources": 2,
    "records": 2,
    "rows": 2,
    "reading": 2,
    "formats": 2,
    "schemas": 2,
    "estimate": 2,
    "text": 2,
    "scorers": 2,
    "reference_scorers": 2,
    "models": 2,
    "sampling": 2,
    "engine": 2,
    "checkpoint": 2,
    "files": 1,
    "hints": 1,
    "words": 1,
    "decoding": 1,
    "discriminator_settings": 1,
    "parents": 2,
    "processes": 1,
    "derived": 1,
    "pass_sizes": 1,
    "zero": 2,
    "deepspeed_config": 1,
    "deepspeed_keys": 1,
    "metrics": 2,
    "training": 2,
    "training_state": 2,
    "sft": 3,
    "rm": 3,
    "descent": 3,
    "experience": 3,
    "pretraining_mix": 3,
    "ppo": 3,
    "ppo_run": 3,
    "ppo_checks": 3,
    "collect": 3,
    "bench": 3,
    "timing": 2,
    "rewards": 3,
    "exposure": 3,
    "evaluation": 3,
}

OUTSIDE = {"data", "stages", "tests"}

# help and show=true answer in two seconds: these must load without the libraries that take longer than that
LIGHT = ("config", "settings", "records", "sources", "checks", "checkpoint", "parents", "estimate")
HEAVY = {"torch", "transformers", "datasets", "trl", "peft", "sklearn", "matplotlib", "pandas"}


def imported_names(path: Path, package: str) -> set[str]:
    """Return full names of all that `path`, a module in `package`, imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            start = parents[: len(parents) - node.level + 1] if node.level else []
            origin = ".".join([*start, node.module] if node.module else start)
            names |= {f"{origin}.{alias.name}" for alias in node.names}
    return names


def violations(root: Path) -> list[str]:
    """Return a sentence for every import below `root`/rlhf that the layers forbid."""
    found = []
    for path in sorted((root / "rlhf").rglob("*.py")):
        module = path.relative_to(root).with_suffix("").parts
        own = module[1]
        if own != "__init__" and own not in LAYERS:
            found.append(f"rlhf.{own} has no layer: add it to LAYERS")
            continue
        for name in sorted(imported_names(path, ".".join(module[:-1]))):
            top, _, rest = name.partition(".")
            target = rest.partition(".")[0]
            if top in OUTSIDE:
                found.append(f"{'.'.join(module)} imports {name}: rlhf never imports {top}")
            elif top == "rlhf" and LAYERS.get(target, -1) > LAYERS.get(own, -1):
                found.append(
                    f"{'.'.join(module)} (layer {LAYERS.get(own)}) imports {name} ({LAYERS[target]})"
                )
    return found


def test_modules_import_from_their_layer_or_below() -> None:
    assert violations(PROJECT_DIR) == []


@pytest.mark.parametrize(
    ("path", "line", "complaint"),
    [
        ("rlhf/numerics/kl.py", "from rlhf.config import load_config", "rlhf.numerics.kl (layer 0) imports"),
        ("rlhf/numerics/kl.py", "from ..models import roles", "imports rlhf.models.roles (2)"),
        ("rlhf/batches.py", "from . import ppo", "rlhf.batches (layer 1) imports rlhf.ppo (3)"),
        ("rlhf/text.py", "def f():\n    import rlhf.evaluation.report", "imports rlhf.evaluation.report (3)"),
        ("rlhf/__init__.py", "from rlhf.numerics import kl", "rlhf.__init__ (layer None) imports"),
        ("rlhf/ppo.py", "import stages.ppo", "rlhf never imports stages"),
        ("rlhf/ppo.py", "from data import toy", "rlhf never imports data"),
        ("rlhf/unheard_of.py", "", "rlhf.unheard_of has no layer"),
    ],
)
def test_a_forbidden_import_is_named(tmp_path: Path, path: str, line: str, complaint: str) -> None:
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(line + "\n", encoding="utf-8")
    (found,) = violations(tmp_path)
    assert complaint in found


def test_imports_that_the_layers_allow_pass(tmp_path: Path) -> None:
    (tmp_path / "rlhf").mkdir()
    lines = [
        "import torch",
        "import datasets",
        "from rlhf import __version__",
        "from . import rm",
        "import rlhf.text",
    ]
    (tmp_path / "rlhf" / "ppo.py").write_text("\n".join(lines), encoding="utf-8")
    assert violations(tmp_path) == []


def test_light_modules_load_no_heavy_library() -> None:
    present = [f"rlhf.{name}" for name in LIGHT if list((PROJECT_DIR / "rlhf").glob(f"{name}*"))]
    program = f"import sys, {', '.join(present)}; print(sorted({HEAVY!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], cwd=PROJECT_DIR, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
