"""What the repository promises about itself."""

import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("data_pipeline", "modeling", "pretrain")
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).glob("*.py")) if path.name != "__init__.py"]


def test_architecture_names_every_file_once_under_its_package_and_no_other():
    sections = re.split(r"^### ", (ROOT / "ARCHITECTURE.md").read_text(), flags=re.MULTILINE)
    for package in PACKAGES:
        section = next(text for text in sections if text.startswith(f"{package}:"))
        named = re.findall(r"^\| `(\w+\.py)` \|", section, flags=re.MULTILINE)
        assert sorted(named) == [path.name for path in SOURCES if path.parent.name == package]


def test_dependencies_point_one_way():
    allowed = {
        "data_pipeline": {"data_pipeline"},
        "modeling": {"modeling"},
        "pretrain": {"pretrain", "modeling", "data_pipeline"},
    }
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in (name.split(".")[0] for name in names):
                assert name not in PACKAGES or name in allowed[path.parent.name], f"{path} imports {name}"
                assert name != "deepspeed" or path.name == "engine.py", f"{path} imports deepspeed"


def test_no_file_is_too_long_to_read():
    long = {path.name: length for path in SOURCES if (length := len(path.read_text().splitlines())) > 400}
    assert not long


def test_torch_is_pinned_and_every_dependency_bounded():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "torch==2.13.0" in project["dependencies"]
    extras = [name for names in project["optional-dependencies"].values() for name in names]
    unbounded = [
        name for name in project["dependencies"] + extras if "==" not in name and not (">=" in name and "<" in name)
    ]
    assert not unbounded


def test_readme_links_lead_somewhere():
    for target in re.findall(r"\]\(([\w./-]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target
