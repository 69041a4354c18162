"""The page holds the files' own numbers, and their texts as text; what is missing is said; no torch, no network, no traceback."""

import base64
import hashlib
import html
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pretrain.report import __main__ as command
from pretrain.report.files import read_run
from pretrain.report.page import SECTIONS, page
from tests.pretrain.report.run_folder import HOSTILE, NATS, metrics, train_line, write_run

TAGS = {
    "html", "head", "meta", "title", "style", "body", "header", "div", "h1", "h2", "h3", "h4", "wbr", "button", "p", "b",
    "span", "dl", "dt", "dd", "data", "nav", "a", "main", "section", "figure", "figcaption", "svg", "line", "text", "path",
    "circle", "table", "thead", "tbody", "tr", "th", "td", "small", "details", "summary", "article", "i", "input", "code",
    "script",
}  # fmt: skip


class Parsed(HTMLParser):
    """Tags with their attributes, texts, and the sections' own texts."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {"": ""}
        self._section, self._inside = "", ""
        self.feed(markup)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "section":
            self._section = dict(attrs)["id"] or ""
            self.texts[self._section] = ""

    def handle_data(self, data: str) -> None:
        if self._inside not in ("style", "script"):
            self.texts[self._section] += data

    def values(self) -> set[str | None]:
        """Of all figures."""
        return {attributes["value"] for tag, attributes in self.tags if tag == "data"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path)


def test_numbers_are_the_files_own(run: Path) -> None:
    markup = page(read_run(run))
    found = Parsed(markup)
    numbers = [
        NATS,
        0.05138786765678644,
        5.758885405692838,
        4.518682421702122,
        0.019186082469274238,
        0.0312345,
        4.8612345,
    ]
    assert {repr(value) for value in numbers} <= found.values()
    assert {"24768", str(200 * 2 * 512), "40940"} <= found.values()  # parameters, tokens seen, tokens of the split
    for line in metrics():
        if line["kind"] == "train":
            assert f"<title>step {line['step']}: training {line['loss']:.6g}</title>" in markup
            assert f"<title>step {line['step']}: training {line['lr']:.6g}</title>" in markup
        if line["kind"] == "eval":
            assert f"<title>step {line['step']}: held-out {line['eval/nats']:.6g}</title>" in markup


def test_every_section_has_its_content(run: Path) -> None:
    texts = Parsed(page(read_run(run))).texts
    assert list(texts)[1:] == [name for name, _, _, _ in SECTIONS]
    for name, expected in {
        "nats": ["of the way from unigram to teacher", "72.7%"],
        "verdict": ["8 x", "≥ 0.8", "ok", "FAIL", "4.8577 ± 0.0514"],
        "losses": ["Training loss", "Learning rate", "Flow loss, t below ¼", "blind 1.3", "covariance 0.9"],
        "samples": ["once", "generated, step 100", "x once 100", "generated, step 200", "x twice 200", "true once"],
        "denoising": ["t = 1.00", "t = 0.50", "t = 0.00"],
        "evaluations": [
            "rouge 2",
            "3.1",
            "(3.0 to 3.3)",
            "4.861",
            "Settings of sampling, x",
            "num steps",
            "8x162.1(2.0 to 2.2)",
            "32x642.9",
        ],
        "throughput": ["2,200", "98%", "0.25 s", "from first start to last line", "00:03:21"],
        "data": ["40,940", "4,096 tokens", "documents 1,190"],
        "vae": ["Reconstruction", "Tokens given back"],
        "configuration": ["rows_per_step"],
    }.items():
        assert not [one for one in expected if one not in texts[name]], name
    assert "Stage dit, step 200 of 200 go" in texts[""]
    assert "commit1a2b3c4x" in texts[""]
    assert "16x32" not in texts["evaluations"]  # a beaten point is in the picture alone
    assert "network evaluations a text 32: tried 0.0198765" in page(read_run(run))


def test_text_from_outside_stays_text_wherever_it_stands(tmp_path: Path) -> None:
    found = Parsed(page(read_run(write_run(tmp_path, HOSTILE))))
    assert {tag for tag, _ in found.tags} <= TAGS
    assert [tag for tag, _ in found.tags].count("script") == 1
    attributes = {name for _, given in found.tags for name in given}
    assert not [name for name in attributes if name.startswith("on") or name in ("style", "src", "srcset")]
    assert {given["href"] for tag, given in found.tags if tag == "a"} == {f"#{name}" for name, _, _, _ in SECTIONS}
    shown = HOSTILE.replace("\x1b", "\\u001b")
    for name in ("verdict", "losses", "samples", "denoising", "evaluations", "throughput", "data", "configuration"):
        assert shown in found.texts[name], name


def test_nothing_but_the_pages_own_style_and_script_may_run(run: Path) -> None:
    markup = page(read_run(run))
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="(.*?)">', markup)
    rules = dict(rule.strip().split(" ", 1) for rule in html.unescape(policy).split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    for name in ("style", "script"):
        (content,) = re.findall(f"<{name}>(.*?)</{name}>", markup, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[f"{name}-src"] == f"'sha256-{digest}'"
    assert markup.index("Content-Security-Policy") < markup.index("<style>")
    assert "://" not in markup


@pytest.mark.parametrize("stage", ["vae", "dit", "distill", "ar", "mdlm"])
def test_what_is_not_there_yet_is_said_in_a_line_each(tmp_path: Path, stage: str) -> None:
    config = {"stage": stage, "data": {"path": "data/x"}, "model": {"vae": "runs/vae"} if stage == "dit" else {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    texts = Parsed(page(read_run(tmp_path))).texts
    said = {
        "nats": {"vae": "Stage vae gives no", "distill": "where its teacher's steps"}.get(stage, "textldm diagnose --run"),
        "verdict": "Not diagnosed yet",
        "losses": "No step has been logged yet", "samples": "No texts", "evaluations": "textldm evaluate",
        "denoising": "textldm generate" if stage in ("dit", "distill") else "does not write by taking noise away",
        "throughput": "No step has been logged yet", "data": "not on this machine: data.path is data/x",
    }  # fmt: skip
    assert {name for name, line in said.items() if line not in texts[name]} == set()
    assert ("not on this machine: model.vae is runs/vae" in texts.get("vae", "")) == (stage == "dit")


def test_two_runs_side_by_side(tmp_path: Path) -> None:
    run, other = write_run(tmp_path / "a"), write_run(tmp_path / "b", train={"steps": 999, "new": True})
    diagnosed = json.loads((other / "diagnosis.json").read_text()) | {"nats_per_token": 4.321}
    (other / "diagnosis.json").write_text(json.dumps(diagnosed))
    with (other / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(train_line(300, loss=1.2345)) + "\n")
    markup = page(read_run(run), read_run(other))
    texts = Parsed(markup).texts
    assert "other 1.234" in texts["losses"] or "other 1.235" in texts["losses"]
    assert "other 4.321" in texts["nats"]
    differences = texts["configuration"].split("Differences from")[1].split("Purpose")[0]
    assert "train.steps200999" in differences
    assert "train.newnot theretrue" in differences
    assert "data.path" not in differences
    assert "None." in Parsed(page(read_run(run), read_run(run))).texts["configuration"]


def test_torn_lines_are_told(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tr')
    assert "a kill tore, left out here: 1." in Parsed(page(read_run(run))).texts[""]


def test_the_command_writes_the_page_without_torch_and_prints_its_path(run: Path) -> None:
    code = f"""
import sys
from pretrain.__main__ import main
code = main(["report", "--run", {str(run)!r}])
slow = {{"torch", "numpy", "matplotlib", "transformers", "deepspeed"}} & sys.modules.keys()
raise SystemExit(f"imported {{slow}}" if slow else code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{run / 'report.html'}\n", "")
    assert (run / "report.html").read_text() == page(read_run(run))


def test_mistakes_are_a_line_each(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file.html").mkdir()
    for arguments, expected in (
        (["--run", str(tmp_path / "none")], "has no config.json"),
        (["--run", str(run), "--against", str(tmp_path)], "has no config.json"),
        (["--run", str(run), "--output", "page.pdf"], "expected a file that ends in .html"),
        (["--run", str(run), "--output", str(tmp_path / "file.html")], "cannot be written"),
        (["--run", str(run), "--evaluation", str(run / "config.json")], "is no result of textldm evaluate"),
    ):
        assert command.main(arguments) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        assert expected in said
