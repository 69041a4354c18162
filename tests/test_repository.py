"""What the repository promises about itself."""

import ast
import os
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("data_pipeline", "modeling", "pretrain")
FLOORS = {
    "data_pipeline": ["core", "format", "text", "reading", "features", "prepare", "cache_features"],
    "modeling": [
        ["attention", "flow", "losses", "prompts", "shapes", "times", "token_statistics"],
        ["beyond_window", "conventions", "floors", "layers", "solvers"],
        ["heads", "pretrained", "repa", "text_vae", "token_transformer"],
        ["text_dit", "textvae", "masked_diffusion", "stock_language_model"],
        ["guidance"],
        ["continuation"],
        ["likelihood"],
        ["textldm", "textmdlm"],
    ],
    "pretrain": [
        "ranks", "engine", "checkpoint", "faults", "config", "telemetry", "runs", "stages", "plan", "session", "export",
        "serve", "diagnose", "evaluate", "report", "train", "jobs", "quickstart", "commands", "completion", "__main__",
    ],
}  # fmt: skip
"""From the ground up: within a package nothing imports from a floor above its own. ARCHITECTURE.md draws it."""


def sources(package: str) -> list[Path]:
    return [path for path in sorted((ROOT / package).rglob("*.py")) if path.name != "__init__.py"]


def imports(path: Path) -> Iterator[str]:
    """Absolute names of what a file imports at its top or within its functions, for type checkers alone too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            package = ".".join(path.relative_to(ROOT).parts[: -node.level]) if node.level else ""
            base = ".".join(part for part in (package, node.module) if part)
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def floor_of(package: str, room: str) -> int:
    floors = FLOORS[package]
    return next(number for number, rooms in enumerate(floors) if room == rooms or room in rooms)


def test_every_file_stands_on_a_named_floor():
    for package, floors in FLOORS.items():
        named = {room for rooms in floors for room in ([rooms] if isinstance(rooms, str) else rooms)}
        found = {path.relative_to(ROOT / package).parts[0].removesuffix(".py") for path in sources(package)}
        assert found == named


def test_dependencies_point_one_way_and_down():
    allowed = {
        "data_pipeline": {"data_pipeline"},
        "modeling": {"modeling"},
        "pretrain": {"pretrain", "modeling", "data_pipeline"},
    }
    wrong = []
    for package in PACKAGES:
        for path in sources(package):
            room = path.relative_to(ROOT / package).parts[0].removesuffix(".py")
            for name in imports(path):
                top, *rest = name.split(".")
                if top in PACKAGES and top not in allowed[package]:
                    wrong.append(f"{path.relative_to(ROOT)} imports {name}: packages know one another one way")
                if (
                    top == package
                    and rest
                    and rest[0] != room
                    and floor_of(package, rest[0]) >= floor_of(package, room)
                ):
                    wrong.append(f"{path.relative_to(ROOT)} imports {name}, which is not below it")
                if top == "deepspeed" and path != ROOT / "pretrain/engine/engine.py":
                    wrong.append(f"{path.relative_to(ROOT)} imports deepspeed")
    assert not wrong, "\n".join(wrong)


def test_architecture_names_every_file_once_and_no_other():
    named = re.findall(
        r"^\| `([\w/]+\.py)` \|", (ROOT / "ARCHITECTURE.md").read_text().split("## Files")[1], flags=re.MULTILINE
    )
    found = [str(path.relative_to(ROOT)) for package in PACKAGES for path in sources(package)]
    assert sorted(named) == sorted(found)


def test_architecture_draws_the_floors_in_their_order():
    page = (ROOT / "ARCHITECTURE.md").read_text()
    drawn = re.findall(
        r"^\| `(data_pipeline|pretrain)/(\w+)(?:\.py)?` \|",
        page.split("## Folders")[1].split("## Files")[0],
        flags=re.MULTILINE,
    )
    assert drawn == [(package, room) for package in ("data_pipeline", "pretrain") for room in FLOORS[package]]


LOCKS = ("requirements.lock", "requirements-text.lock", "requirements-uv.lock")


def test_torch_is_pinned_and_every_dependency_bounded():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "torch==2.13.0" in project["dependencies"]
    extras = [name for names in project["optional-dependencies"].values() for name in names]
    unbounded = [
        name for name in project["dependencies"] + extras if "==" not in name and not (">=" in name and "<" in name)
    ]
    assert not unbounded


def test_lock_pins_every_dependency_within_its_bounds_and_nothing_else():
    """What `./run.sh lock` wrote is stale as soon as pyproject.toml asks for something else."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [name for extra in ("dev", "eval", "serve") for name in project["optional-dependencies"][extra]]
    wanted = [Requirement(name) for name in project["dependencies"] + extras]
    pinned, asked_for = locked((ROOT / "requirements.lock").read_text())
    assert asked_for == {canonicalize_name(one.name) for one in wanted} - {"torch"}, "run ./run.sh lock"
    outside = [
        str(one) for one in wanted if one.name != "torch" and pinned[canonicalize_name(one.name)] not in one.specifier
    ]
    assert not outside, f"run ./run.sh lock: the lock's versions do not fit {outside}"


def test_lock_names_no_machine_and_no_index():
    for lock in LOCKS:
        text = (ROOT / lock).read_text()
        assert all(re.match(r"[\w-]+==|    --hash=sha256:[0-9a-f]{64}|\s*#|$", line) for line in text.splitlines())
        assert "://" not in text


def test_attack_19_everything_comes_by_its_hash_and_torch_from_one_index() -> None:
    for lock in LOCKS:
        pins = re.split(r"\n(?=[\w-]+==)", (ROOT / lock).read_text())[1:]
        assert pins
        assert all("--hash=sha256:" in pin for pin in pins)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pinned, _ = locked((ROOT / "requirements-text.lock").read_text())
    assert pinned.items() >= {tuple(name.split("==")) for name in extras["quickstart"]}
    script = (ROOT / "run.sh").read_text()
    install = script.split("install() {")[1].split("\n}\n")[0]
    assert not re.search(r"extra-index|EXTRA_INDEX", script)
    for line in (line for line in install.replace("\\\n", " ").splitlines() if re.search(r"pip\[@\]|uv pip", line)):
        assert (
            "torch==2.13.0" in line
            or "--require-hashes" in line
            or line.split()[1:3] == ["--no-deps", "--no-build-isolation"]
        )


def locked(lock: str) -> tuple[dict[str, str], set[str]]:
    """The pins of a lock, and the names of those that pyproject.toml itself asks for."""
    pinned, asked_for, name = {}, set(), ""
    for line in lock.splitlines():
        if found := re.match(r"([\w.-]+)==(\S+)", line):
            name = found[1]
            pinned[name] = found[2]
        elif re.fullmatch(r"\s+# +(via )?textldm \(pyproject\.toml\)", line):
            asked_for.add(name)
    return pinned, asked_for


def test_decisions_stand_newest_first():
    for page in (ROOT / "docs/decisions").glob("*.md"):
        dates = re.findall(r"^\*\*(?:.|\n)*?\*\* \((\d{4}-\d\d-\d\d)", page.read_text(), flags=re.MULTILINE)
        assert dates == sorted(dates, reverse=True), page.name


def test_links_and_named_files_lead_somewhere():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"
    texts = [
        path
        for folder in (*PACKAGES, "benchmarks", "configs")
        for path in (ROOT / folder).rglob("*.[pj][ys]*")
        if path.suffix != ".pyc"
    ]
    for path in [*pages, *texts]:
        for target in re.findall(
            rf"(?<![\w/])(?:{'|'.join(PACKAGES)}|benchmarks|docs)/[\w/-]+\.(?:py|md)\b", path.read_text()
        ):
            assert (ROOT / target).exists(), f"{path.relative_to(ROOT)} names {target}"


def test_run_sh_takes_the_recipes_options_and_says_others_before_it_installs() -> None:
    from pretrain.quickstart.recipe import make_parser

    options = {option for action in make_parser()._actions for option in action.option_strings} - {"-h", "--help"}
    script = (ROOT / "run.sh").read_text()
    pattern = script.split("check() {")[1].split("esac")[0]
    assert set(re.findall(r"(--[a-z]+)(?:=\*)?(?= |\))", pattern)) - {"--help"} == options
    for mistake in (["--hlep"], ["instal"], ["--long", "--sourc=x"], ["--source"]):
        environment = {"PATH": os.environ["PATH"], "PYTHON": "/nonexistent"}
        done = subprocess.run([ROOT / "run.sh", *mistake], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert "/nonexistent" not in done.stderr
        assert done.stdout == ""


@pytest.mark.parametrize(
    ("works", "has_nvcc", "tries"),
    [
        ("import", True, []),
        ("wheel", True, ["--only-binary=:all:"]),
        ("build", True, ["--only-binary=:all:", "--no-build-isolation"]),
        ("nothing", True, ["--only-binary=:all:", "--no-build-isolation"]),
        ("build", False, ["--only-binary=:all:"]),
    ],
)
def test_run_sh_installs_flash_attention_in_the_way_that_works(
    tmp_path: Path, works: str, has_nvcc: bool, tries: list[str]
) -> None:
    """On machines with a GPU, with a pip that does what it is told; what cannot be had is a line, and no mistake."""
    script = (ROOT / "run.sh").read_text()
    install, function = (script.split(f"{name}() {{")[1].split("\n}\n")[0] for name in ("install", "kernels"))
    assert re.search(r"if command -v nvidia-smi .*; then kernels; fi", install)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        """#!/bin/bash
case "$*" in
  *flash_attn_varlen_func*) [[ -f there ]]; exit ;;
  *uninstall*) rm -f there; exit 0 ;;
esac
echo "$*" >> pip.log
[[ "$*" == *--no-deps* && "$*" == *flash-attn==* ]] || exit 1
if [[ $WORKS == wheel && "$*" == *only-binary* || $WORKS == build && "$*" == *no-build-isolation* ]]; then touch there; fi
[[ -f there ]]
"""
    )
    python.chmod(0o755)
    (tmp_path / "bin").mkdir()
    if has_nvcc:
        (tmp_path / "bin" / "nvcc").write_text("#!/bin/bash\n")
        (tmp_path / "bin" / "nvcc").chmod(0o755)
    if works == "import":
        (tmp_path / "there").touch()
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"kernels() {{{function}\n}}\nkernels"],
        cwd=tmp_path, env={"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "WORKS": works},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    log = tmp_path / "pip.log"
    calls = log.read_text().splitlines() if log.exists() else []
    assert [
        next(way for way in ("--only-binary=:all:", "--no-build-isolation") if way in call) for call in calls
    ] == tries
    had = works in ("import", "wheel") or (works == "build" and has_nvcc)
    assert ("torch_varlen" in done.stderr) != had


def test_attack_6_nothing_is_loaded_with_its_own_code() -> None:
    """Without a word transformers asks at a prompt; so every call says it (docs/security.md)."""
    calls = [
        (path, node)
        for package in ("data_pipeline", "pretrain")
        for path in sources(package)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("from_pretrained", "get_config_dict")
    ]
    assert len(calls) >= 6
    for path, node in calls:
        said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert said.get("trust_remote_code") == "False", f"{path}:{node.lineno}"


def test_every_attack_of_the_page_on_security_has_its_test() -> None:
    page = (ROOT / "docs/security.md").read_text()
    named = re.findall(r"^\| (\d+[a-z]?) \| .* \| `(tests/[\w/]+\.py)` \|$", page, flags=re.MULTILINE)
    assert len(named) >= 40
    for attack, file in named:
        text = (ROOT / file).read_text()
        number = re.match(r"\d+", attack)[0]
        assert re.search(rf"def test_attacks?_[\w]*(?<![0-9]){number}(?:{attack[len(number) :]})?(?![0-9])", text), (
            f"{attack}: {file}"
        )
