"""gpu.py runs whole on a pretended GPU, with nothing but a bare machine's packages and .site.

So no minute on a GPU is lost to a mistake in Python. The recipe is nano with random towers and
hardly any pixels; what is asserted is that each step ends well and leaves its numbers.
"""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu
import gpu_site
import pytest
import transformers
from helpers.scripts import SMALL_NANO
from lib import tables as results

ROOT = Path(__file__).parents[2]
PRETENDED = Path(__file__).parent / "mock_gpu"
NANO = "--config-file configs/moe_tuning/nano_x16_stamps.py"
# Begins with an option of one value: those of several would take the overrides for theirs.
SMALL = (
    "--repeats 2 model.denoising.num_queries=2 model.decoder.layer.image_attention.heads=1 "
    f"model.decoder.layer.image_attention.points=1 {' '.join(SMALL_NANO)}"
)
LAYER = "--tokens 3 --dim 16 --hidden 16 --experts 2 --repeats 2"
FURTHER = {
    "kernels": "-k one_expert_is_the_dense_ffn",
    "graphs": "",
    "fps": f"{NANO} --sizes 64x64 --precisions float32 {SMALL}",
    "layer": f"{LAYER} --layers 1 --dtypes float16",
    "tune": f"{LAYER} --dtypes float16 --workers 1",
    "fps_tuned": f"{NANO} --sizes 32x32 {SMALL}",
    "fps_large": f"{NANO} --sizes 64x96 --precisions float32 --many-names 45 {SMALL}",
    "training_step": f"{NANO} --size 64 --batch 1 --names 3 --boxes 2 --dtype float16 {SMALL}",
    "public_weights": "--photos 1 --repeats 2 --threshold 0.95 --size 96 160",
}


def start(out: Path, *arguments: str, **more: str) -> subprocess.Popen:
    """gpu.py as on a GPU."""
    command = [sys.executable, ROOT / "benchmarks/gpu.py", "--out", out, *arguments]
    further = FURTHER | more
    command += [f"--with={step}={text}" for step, text in further.items()]
    path = os.pathsep.join([str(PRETENDED), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "BARE_PYTHON": ",".join(gpu_site.BARE)}
    # Deformable attention takes minutes in Triton's interpreter. Candidates name their back-end,
    # and the steps "kernels" and "graphs" don't heed this.
    environment["DYNAMIC_DINO_KERNELS"] = "grouped"
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """.site for the Python that runs the tests."""
    folder = tmp_path_factory.mktemp("carried") / "site"
    own = ".".join(map(str, sys.version_info[:2]))
    assert gpu_site.main(["--out", str(folder), "--python", own]) == 0
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *[before] * bool(before)])
    yield folder
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A small Grounding DINO as it would be downloaded."""
    import public_weights

    folder = tmp_path_factory.mktemp("hub")
    bert = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    ffn = dict(encoder_ffn_dim=64, decoder_ffn_dim=64, text_config=transformers.BertConfig(**bert))
    sizes = dict(num_queries=30, d_model=64, encoder_layers=1, decoder_layers=2, **ffn)
    swin = dict(embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 2], out_indices=[2, 3, 4])
    small = functools.partial(transformers.GroundingDinoConfig, **sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(public_weights.transformers, "GroundingDinoConfig", small)
        public_weights.save_random(folder, False, swin)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("REHEARSE_GPU") != "1", reason="takes minutes: REHEARSE_GPU=1 asks for it"
)
def test_the_whole_script_on_a_pretended_gpu(site, weights, tmp_path, monkeypatch):
    public = f"{FURTHER['public_weights']} --weights hf:{weights}"
    run = start(tmp_path / "out", "--seconds", "3000", public_weights=public)
    output, _ = run.communicate()
    [folder] = (tmp_path / "out").iterdir()
    log = (folder / "log.txt").read_text()
    assert run.returncode == 0, output + log
    assert "missing:" not in output and "can't be read" not in output

    state = json.loads((folder / "steps.json").read_text())
    assert list(state["steps"]) == [step.name for step in gpu.all_steps()]
    assert all(step["rc"] == 0 and step["headline"] for step in state["steps"].values())
    files = {path.name for path in folder.iterdir()}
    assert files == {"steps.json", "log.txt", "tuned.json"} | {
        f"{step.result}.json" for step in gpu.all_steps() if step.result
    }
    assert len(files) <= 8  # they are carried back from elsewhere

    # Where a graph was asked for, there was one.
    report = json.loads((folder / "fps.json").read_text())
    cases = [(row["size"], row["precision"], row["mode"]) for row in report["rows"]]
    assert cases == [
        ([64, 64], "float32", "graph"),
        ([64, 64], "float32", "eager"),
        ([64, 96], "float32", "graph"),
    ]
    assert report["many_names"]["names"] == 45 and report["command"].count("fps.py") == 2
    assert {"dense", "experts, triton"} <= set(report["rows"][0]["results"])
    for row in report["rows"]:
        ran = {name: result["ran"] for name, result in row["results"].items()}
        ran.pop("experts, sequential", None)  # it waits for the GPU, and says so
        assert set(ran.values()) == {row["mode"]}

    # ... and they become pages.
    monkeypatch.setattr(results, "RESULTS", tmp_path / "out")
    page = results.page()
    assert "## h100-pretended" in page and "45 names in 2 chunks" in page
    for name in ("fps.json", "fps_tuned.json", "moe_layer.json", "training_step.json"):
        assert f"results/h100-pretended/{name}" in page

    # A further call has nothing to do but to look around.
    again = start(tmp_path / "new", "--resume", str(tmp_path / "out"), "--seconds", "60")
    output, _ = again.communicate()
    assert again.returncode == 0 and "== " not in output and "fps_tuned      ok" in output


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """gpu.py with steps that do what a line of Python says, and a GPU that is there."""
    steps = []

    def call(*arguments, lines: dict[str, str], limit: float = 60.0) -> int:
        steps[:] = [
            gpu.Step(name, limit, ["-c", line], "json", "fps" * name.startswith("fps"))
            for name, line in lines.items()
        ]
        return gpu.main(["--out", str(tmp_path / "out"), *arguments])

    found = json.dumps({"gpu": "some-gpu", "machine": "Some GPU", "missing": {}})
    look = gpu.Step("imports", 60, ["-c", f"print('looked'); print({found!r})"], "")
    monkeypatch.setattr(gpu, "IMPORTS", look)
    monkeypatch.setattr(gpu, "all_steps", lambda: list(steps))
    monkeypatch.setattr(gpu.signal, "signal", lambda *given: None)  # those of the tests stay
    return call


def state_of(folder: Path) -> dict:
    return json.loads((folder / "out/some-gpu/steps.json").read_text())["steps"]


ROWS = """
import json, sys, time
row = {{"size": [1, 2], "precision": "float16", "mode": "graph", "text": "text cached", "batch": 1,
       "results": {{"dense": {{"fps": {dense}}}, "experts, triton": {{"fps": 2.0}}}}}}
report = {{"rows": [row], "command": "python fps.py {mode}"}}
row["mode"] = "{mode}"
open(sys.argv[sys.argv.index("--json") + 1], "w").write(json.dumps(report))
"""


@pytest.mark.slow
def test_a_step_that_fails_or_hangs_does_not_stop_the_next(fake, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "MOST", 1.0)
    lines = {
        "bad": "raise SystemExit('out of luck')",
        "fps_slow": ROWS.format(dense=4.0, mode="graph") + "time.sleep(60)",
        "good": "print('12 passed')",
    }
    assert fake(lines=lines, limit=3.0) == 1
    state = state_of(tmp_path)
    assert [state[name]["rc"] for name in lines] == [1, None, 0]
    assert 3 <= state["fps_slow"]["seconds"] < 30 and state["good"]["headline"] == ["12 passed"]
    # What it had measured before it was cut off is kept.
    report = json.loads((tmp_path / "out/some-gpu/fps.json").read_text())
    assert report["rows"][0]["results"]["dense"]["fps"] == 4.0
    text = capsys.readouterr().out
    assert "out of luck" in text and "cut off" in text and "failed (1)" in text
    assert "1x2 float16 graph: dense 4.0 FPS; triton 0.50 of it" in text


def test_a_second_call_does_what_was_not_tried_and_then_what_failed(fake, tmp_path, capsys):
    lines = {"a": "print('ok')", "b": "raise SystemExit(3)", "c": "print('new')"}
    assert fake("--only", "a", "b", lines=lines) == 1
    capsys.readouterr()
    lines["a"], lines["b"] = "raise SystemExit('never again')", "print('mended')"
    assert fake(lines=lines) == 0
    text = capsys.readouterr().out
    assert "== a" not in text and text.index("== c") < text.index("== b")
    assert state_of(tmp_path)["b"]["headline"] == ["mended"]


def test_rows_of_several_steps_share_a_file(fake, tmp_path):
    lines = {
        "fps": ROWS.format(dense=4.0, mode="graph"),
        "fps_more": ROWS.format(dense=5.0, mode="eager"),
        "fps_again": ROWS.format(dense=6.0, mode="graph"),
    }
    assert fake(lines=lines) == 0
    report = json.loads((tmp_path / "out/some-gpu/fps.json").read_text())
    rows = {row["mode"]: row["results"]["dense"]["fps"] for row in report["rows"]}
    assert rows == {"graph": 6.0, "eager": 5.0} and len(report["rows"]) == 2
    assert report["command"] == "python fps.py graph && python fps.py eager"


def test_results_that_cannot_be_read_are_a_failure(fake, tmp_path):
    write = "import sys; open(sys.argv[sys.argv.index('--json') + 1], 'w').write('{\"rows')"
    assert fake(lines={"fps": write, "next": "print(1)"}) == 1
    state = state_of(tmp_path)
    assert state["fps"]["rc"] == gpu.UNREADABLE and state["next"]["rc"] == 0


@pytest.mark.slow
def test_no_time_and_missing_packages_are_told(fake, monkeypatch, capsys):
    lines = {"a": "import time; time.sleep(4); print(1)", "b": "print(2)"}
    assert fake("--seconds", "14", lines=lines, limit=10) == 0  # of 9 each step needs 6
    text = capsys.readouterr().out
    assert "== a" in text and "b              left out: no time" in text

    found = {"gpu": "other-gpu", "machine": "Some GPU", "missing": {"json": "fvcore"}}
    look = gpu.Step("imports", 60, ["-c", f"print({json.dumps(found)!r})"], "")
    monkeypatch.setattr(gpu, "IMPORTS", look)
    assert fake(lines=lines) == 1
    assert "a              left out: fvcore is missing" in capsys.readouterr().out


def test_plans_with_the_time_there_is():
    steps = [gpu.Step(name, limit, [], "") for name, limit in (("a", 100), ("b", 50), ("c", 50))]
    assert gpu.plan(steps, 200) == {"a": 100, "b": 50, "c": 50}
    assert gpu.plan(steps, 150) == {"a": 75, "b": 37.5, "c": 37.5}
    assert gpu.plan(steps, 100) == pytest.approx({"a": 100 * 2 / 3, "b": 100 / 3})
    assert gpu.plan(steps, 10_000) == {"a": 200, "b": 100, "c": 100}  # at most twice
    assert gpu.plan(steps, 50) == gpu.plan([], 50) == {}
    limits = gpu.plan(gpu.all_steps(), 600 - gpu.IMPORTS.limit)
    assert len(limits) == len(gpu.all_steps())  # ten minutes are enough for all


@pytest.mark.slow
def test_killed_it_takes_its_step_along(site, tmp_path):
    run = start(tmp_path / "out", "--only", "kernels", kernels="-k one_expert --collect-only")
    children: list[str] = []
    while not children and run.poll() is None:
        time.sleep(0.05)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    assert children
    run.terminate()
    run.communicate()
    assert run.returncode == 128 + signal.SIGTERM
    assert not any(alive(int(child)) for child in children)


def alive(pid: int) -> bool:
    """A zombie that nobody has waited for is not."""
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and path.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
def test_without_a_gpu_it_says_so(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/gpu.py", "--out", tmp_path],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "missing: a CUDA GPU (PyTorch 2" in done.stdout
    assert "imports: failed" in done.stderr


def test_wrong_arguments_are_explained(capsys, tmp_path):
    for arguments, message in (
        (["--with", "fsp=--repeats 2"], "--with: fsp: choose from kernels, graphs"),
        (["--resume", str(tmp_path / "none")], "--resume: there is no folder"),
        (["--only", "everything"], "invalid choice: 'everything'"),
    ):
        with pytest.raises(SystemExit):
            gpu.main(arguments)
        assert message in capsys.readouterr().err
