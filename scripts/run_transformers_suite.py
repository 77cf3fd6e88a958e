"""Runs the model tests of Hugging Face transformers with eager experts and with flashmoe's, and
compares test by test.

    python scripts/run_transformers_suite.py [--training] [-k EXPRESSION]
                                             [--checkout DIR [--models NAME ...]]

Without --checkout: the common model tests (`test_modeling_common.py`, `test_training_mixin.py`) of
the source distribution of the installed version, from PyPI, on the eight small models of
`transformers_suite_models.py`. The source distribution holds neither the tests of the single models
nor those of generation; what the common tests import from those is left empty. --training adds the
tests that train each model until it knows a text by heart (minutes for each).
With --checkout: `tests/models/NAME/test_modeling_NAME.py` of a git checkout of transformers at the
installed version, whole.

Every test runs twice, and every model in it uses the implementation unless the test chooses one.
The exit code is 1 if a test ends differently; build/logs has the output. Needs `parameterized`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from importlib import metadata
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent
LOGS = SCRIPTS.parent / "build" / "logs"
PLUGIN = Path(__file__).stem
VARIABLE = "TRANSFORMERS_SUITE_EXPERTS"
LAUNCHES = "TRANSFORMERS_SUITE_LAUNCHES"  # the file that the tests' process leaves their number in
IMPLEMENTATIONS = ("eager", "flashmoe")
MODELS = (
    "mixtral",
    "qwen3_moe",
    "olmoe",
    "deepseek_v3",
    "glm4_moe",
    "gpt_oss",
    "llama4",
    "phimoe",
)
# Modules that the common tests import and the source distribution lacks: file -> class.
ABSENT = {
    "exporters/test_export.py": "ExportTesterMixin",
    "generation/test_utils.py": "GenerationTesterMixin",
}


def pytest_configure() -> None:
    """In the process of the tests: the implementation of every model that was told none."""
    import flashmoe
    from flashmoe import _core
    from transformers.modeling_utils import PreTrainedModel

    flashmoe.integrations.transformers.register()
    described = _core.layer

    def layer(*operands):
        launches.append(operands[0])
        return described(*operands)

    _core.layer = layer  # every launch of the engine asks it for its layer
    chosen = os.environ[VARIABLE]
    checked = PreTrainedModel.get_correct_experts_implementation

    def get_correct_experts_implementation(self, requested_experts):
        return checked(self, chosen if requested_experts is None else requested_experts)

    PreTrainedModel.get_correct_experts_implementation = get_correct_experts_implementation


launches: list[str] = []


def pytest_unconfigure() -> None:
    Path(os.environ[LAUNCHES]).write_text(str(len(launches)))


def source_tests(into: Path) -> Path:
    """The tests of the source distribution under `into`, with our models; returns their file."""
    version = metadata.version("transformers")
    download = [sys.executable, "-m", "pip", "download", f"transformers=={version}", "--no-deps"]
    download += ["--no-binary", "transformers", "--no-build-isolation", "--quiet"]
    subprocess.run([*download, "--dest", str(into)], check=True)
    with tarfile.open(next(into.glob("transformers-*.tar.gz"))) as archive:
        archive.extractall(into, filter="data")
    tests = into / f"transformers-{version}" / "tests"
    for name, mixin in ABSENT.items():
        path = tests / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"class {mixin}:\n    pass\n")
        (path.parent / "__init__.py").touch()
    (tests / "__init__.py").touch()
    return Path(shutil.copy(SCRIPTS / "transformers_suite_models.py", tests / "test_suite.py"))


def run(
    implementation: str, targets: list[Path], root: Path, options: list[str], training: bool
) -> dict[str, str]:
    """Runs the targets with one implementation: outcome by test."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", PLUGIN]
        command += ["-p", "no:cacheprovider", "-o", "addopts=", f"--junitxml={report}", *options]
        count = Path(folder) / "launches.txt"
        environment = {
            **os.environ,
            VARIABLE: implementation,
            LAUNCHES: str(count),
            "PYTHONPATH": os.pathsep.join((str(SCRIPTS), os.environ.get("PYTHONPATH", ""))),
            "HF_HUB_OFFLINE": "1",
            "RUN_TRAINING_TESTS": str(int(training)),
        }
        LOGS.mkdir(parents=True, exist_ok=True)
        log = LOGS / f"transformers-{implementation}.log"
        with log.open("w") as output:
            subprocess.run(
                [*command, *map(str, targets)],
                cwd=root,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        if not report.exists():
            raise SystemExit(log.read_text()[-4000:])
        print(f"{implementation:10} {count.read_text()} launches of flashmoe")
        if (implementation == "flashmoe") != (int(count.read_text()) > 0):
            raise SystemExit("the tests did not use the implementation that they were told to")
        cases = ElementTree.parse(report).iter("testcase")
        return {f"{case.get('classname')}::{case.get('name')}": outcome(case) for case in cases}


def outcome(case: ElementTree.Element) -> str:
    for word in ("failure", "error", "skipped"):
        if case.find(word) is not None:
            return word
    return "passed"


def compare(eager: dict[str, str], ours: dict[str, str]) -> list[str]:
    """Prints the counts of both; the tests that end differently with flashmoe."""
    for name, outcomes in zip(IMPLEMENTATIONS, (eager, ours), strict=True):
        print(
            f"{name:10}", ", ".join(f"{n} {word}" for word, n in Counter(outcomes.values()).items())
        )
    both = [test for test in eager if eager[test] in ("failure", "error")]
    for test in both:
        print(f"fails with eager, {ours.get(test, 'missing')} with flashmoe: {test}")
    names = sorted({*eager, *ours})
    return [test for test in names if eager.get(test) != ours.get(test)]


def main() -> int:
    parser = argparse.ArgumentParser(description="transformers' model tests with flashmoe.")
    parser.add_argument("--checkout", type=Path, help="a git checkout of transformers")
    parser.add_argument("--models", nargs="+", default=MODELS, help="with --checkout")
    parser.add_argument("--training", action="store_true", help="tests that train a model, too")
    parser.add_argument("-k", dest="select", help="as in pytest")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.checkout:
            root = options.checkout.resolve()
            targets = [
                root / "tests" / "models" / name / f"test_modeling_{name}.py"
                for name in options.models
            ]
        else:
            target = source_tests(Path(folder))
            root, targets = target.parents[1], [target]
        select = ["-k", options.select] if options.select else []
        eager, ours = (
            run(name, targets, root, select, options.training) for name in IMPLEMENTATIONS
        )
    different = compare(eager, ours)
    for test in different:
        print(f"{eager.get(test)} with eager, {ours.get(test)} with flashmoe: {test}")
    print(f"{len(eager)} tests, {len(different)} differ")
    return 1 if different or not eager else 0


if __name__ == "__main__":
    sys.exit(main())
