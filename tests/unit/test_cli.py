"""The command line's contract: one JSON document, exit codes, one-line errors, headers only for `tokens`."""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import write_nvila_checkpoint, write_siglip_checkpoint
from PIL import Image
from safetensors.torch import load_file

from siglane.cli import demo, doctor, tokens
from siglane.cli.main import COMMANDS, main
from siglane.llm import LLM, VisionEncoder
from siglane.nn.cpu.int8 import has_integer_products
from siglane.types import SamplingParams

HEADERS = 1000


@pytest.fixture(scope="module")
def model(nvila_folder: Path) -> str:
    return str(nvila_folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    paths = []
    for number, (width, height) in enumerate([(60, 50), (160, 120), (50, 200)]):
        paths.append(str(folder / f"{number}.png"))
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(paths[-1])
    return paths


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "siglane.cli.main", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def generate(model: str, *words: str) -> list[str]:
    return ["generate", model, "--prompt", "What is in image?", "--device", "cpu", "--kv-tokens", "4096", *words]


def test_generate_prints_one_json_document(model: str, pictures: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(generate(model, "--image", *pictures[:2], "--max-tokens", "5", "--ignore-eos", "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {
        "text", "reasoning", "prompt_token_ids", "output_token_ids", "finish_reason", "usage", "images", "timings",
    }  # fmt: skip
    llm = LLM(model, device="cpu", kv_tokens=4096)
    prompt = {"prompt": "What is in image?", "images": pictures[:2]}
    (expected,) = llm.generate(prompt, SamplingParams(max_tokens=5, ignore_eos=True))
    assert found["text"] == expected.text
    assert tuple(found["prompt_token_ids"]) == expected.prompt_token_ids
    assert tuple(found["output_token_ids"]) == expected.output_token_ids
    usage = found["usage"]
    assert usage["prompt_tokens"] == usage["image_tokens"] + usage["text_tokens"] == len(found["prompt_token_ids"])
    assert usage["total_tokens"] == usage["prompt_tokens"] + 5


def test_generate_streams_the_text_it_would_print(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(generate(model, "--max-tokens", "9", "--ignore-eos")) == 0
    whole = capsys.readouterr().out
    assert main(generate(model, "--max-tokens", "9", "--ignore-eos", "--stream")) == 0
    assert capsys.readouterr().out == whole


def test_generate_reports_what_was_asked_for(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--max-tokens", "3", "--n", "2", "--temperature", "1", "--seed", "1", "--logprobs", "1", "--json"]
    assert main(generate(model, *words)) == 0
    found = json.loads(capsys.readouterr().out)
    first, second = found["outputs"]
    assert first["output_token_ids"] == found["output_token_ids"] != second["output_token_ids"]
    assert [entry["token_id"] for entry in found["logprobs"]] == found["output_token_ids"]


def test_the_environment_sets_options_and_flags_win(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIGLANE_MAX_TOKENS", "2")
    monkeypatch.setenv("SIGLANE_IGNORE_EOS", "1")
    monkeypatch.setenv("SIGLANE_GENERATE_JSON", "1")
    assert main(generate(model)) == 0
    assert json.loads(capsys.readouterr().out)["usage"]["completion_tokens"] == 2
    assert main(generate(model, "--max-tokens", "4")) == 0
    assert json.loads(capsys.readouterr().out)["usage"]["completion_tokens"] == 4


def test_tokens_counts_each_picture_alone_or_all_together(
    model: str, pictures: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tokens", model, *pictures, "--sizes", "160x120", "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert [row["image"] for row in alone] == [*pictures, "160x120"]
    assert all(set(row) == {"image", "image_tokens", "tiles", "grids", "detail", "limits"} for row in alone)
    assert alone[1] == {**alone[3], "image": pictures[1]}
    assert alone[1]["tiles"] == 13  # 4 x 3 and the thumbnail
    assert alone[1]["grids"] == [[4, 4]] * 13
    assert main(["tokens", model, *pictures, "--together", "--json"]) == 0
    assert [row["tiles"] for row in json.loads(capsys.readouterr().out)] == [1, 1, 1]
    assert main(["tokens", model, *pictures]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 5
    assert table[-1].split()[0] == str(sum(row["image_tokens"] for row in alone[:3]))


def test_tokens_says_what_generate_uses(model: str, pictures: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for path in pictures:
        assert main(["tokens", model, path, "--json"]) == 0
        (row,) = json.loads(capsys.readouterr().out)
        assert main(generate(model, "--image", path, "--max-tokens", "1", "--json")) == 0
        assert json.loads(capsys.readouterr().out)["usage"]["image_tokens"] == row["image_tokens"]


def test_a_thousand_headers_take_less_than_a_second(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One second on a quiet machine, three here. Pixels are never decoded: half of every file is missing."""
    noise = Image.effect_noise((600, 400), 100).convert("RGB")
    for number in range(HEADERS):
        path = tmp_path / f"{number}.jpg"
        if number < 20:
            noise.resize((300 + 20 * number, 400)).save(path)
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        else:
            path.write_bytes((tmp_path / f"{number % 20}.jpg").read_bytes())
    paths = [str(tmp_path / f"{number}.jpg") for number in range(HEADERS)]
    assert main(["tokens", model, paths[0], "--json"]) == 0  # start-up
    capsys.readouterr()
    monkeypatch.setattr("siglane.weights.load.stored_tensors", None)  # weights are not even listed
    begin = time.process_time()
    assert main(["tokens", model, *paths, "--json"]) == 0
    assert time.process_time() - begin < 3
    assert len(json.loads(capsys.readouterr().out)) == HEADERS


def test_encode_writes_features_and_projected_rows(model: str, pictures: list[str], tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    assert main(["encode", model, *pictures, "-o", str(output), "--device", "cpu"]) == 0
    found = load_file(output)
    assert list(found) == ["0", "1", "2", "projected.0", "projected.1", "projected.2"]
    for number, encoded in enumerate(VisionEncoder(model, device="cpu").run(pictures)):
        assert torch.equal(found[str(number)], encoded.projector_input)
        assert torch.equal(found[f"projected.{number}"], encoded.rows)  # type: ignore[arg-type]


def test_encode_takes_a_plain_tower(tmp_path: Path, pictures: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    write_siglip_checkpoint(tmp_path / "siglip")
    output = tmp_path / "out.safetensors"
    words = [str(tmp_path / "siglip"), *pictures]
    assert main(["encode", *words, "-o", str(output), "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"image": path, "features": [16, 32]} for path in pictures]
    assert sorted(load_file(output)) == ["0", "1", "2"]
    assert main(["tokens", *words, "--json"]) == 0
    assert [row["image_tokens"] for row in json.loads(capsys.readouterr().out)] == [16, 16, 16]


@pytest.mark.parametrize("lite", [True, False])
def test_look_draws_a_page(lite: bool, pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_nvila_checkpoint(tmp_path / "model", lite=lite)
    output = tmp_path / "view.png"
    assert main(["look", str(tmp_path / "model"), pictures[1], "-o", str(output), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["view"] == str(output)
    assert found["tiles"] == (13 if lite else 1 + 4 + 12)
    page = Image.open(output)
    assert page.width > 1000
    assert len(page.convert("P").getcolors(256)) > 50  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["tokens", "demo", "--wide"], "unrecognized arguments: --wide; see siglane tokens --help"),
        (["tokens", "MODEL"], "no pictures; give IMAGE files or --sizes"),
        (["tokens", "MODEL", "--sizes", "3by4"], "'3by4' is not a size"),
        (["tokens", "MODEL", "/nowhere.png"], "/nowhere.png: cannot be read: No such file"),
        (["tokens", "/nowhere", "--sizes", "3x4"], "there is no folder '/nowhere'"),
        (["generate", "MODEL"], "--prompt is missing"),
        (["generate", "MODEL", "-p", "x", "--temperature", "9"], "temperature must be between 0 and 2, got 9.0"),
        (["generate", "MODEL", "-p", "x", "--stream", "--json"], "--stream and --json exclude each other"),
        (["generate", "MODEL", "-p", "x", "-i", "/nowhere.png"], "/nowhere.png: cannot be read"),
        (["generate", "MODEL", "-p", "x", "--device", "toaster"], "device 'toaster' is not known"),
        (["generate", "MODEL", "-p", "x", "--attention-backend", "flash_attn"], "cannot run on cpu"),
        (["encode", "MODEL", "x.png", "-o", "/nowhere/out.safetensors"], "there is no folder /nowhere"),
        (["look", "MODEL", "PICTURE", "-o", "/"], "cannot write /"),
        (["serve", "MODEL", "--port", "99999"], "port must be between 0 and 65535"),
        (["serve", "/nowhere"], "there is no folder '/nowhere'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    words: list[str], complaint: str, model: str, pictures: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    replaced = {"MODEL": model, "PICTURE": pictures[0]}
    assert main([replaced.get(word, word) for word in words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("siglane: error: ")
    assert complaint in printed.err
    assert printed.err.count("\n") == 1


def test_a_taken_port_is_a_mistake_reported_at_once(model: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        answer = run("serve", model, "--port", str(listener.getsockname()[1]))
    assert answer.returncode == 2
    assert "is in use" in answer.stderr
    assert answer.stderr.count("\n") == 1


@pytest.mark.slow  # processes are started
def test_a_process_of_its_own_ends_with_the_same_codes(model: str, pictures: list[str]) -> None:
    answer = run("tokens", model, *pictures, "--json")
    assert answer.returncode == 0
    assert len(json.loads(answer.stdout)) == 3
    assert answer.stderr == ""
    answer = run("tokens", "/nowhere", *pictures, "--json")
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr.startswith("siglane: error: there is no folder")


WRONG_NAMES = """
import sys
from siglane.cli.main import main

commands = ("tokens /nowhere x", "look /nowhere x", "encode /nowhere x --output x", "generate /nowhere --prompt x")
codes = [main(command.split()) for command in commands]
sys.exit(f"{codes} {'torch' in sys.modules}")
"""


def test_a_wrong_name_is_reported_before_anything_slow_is_imported() -> None:
    done = subprocess.run([sys.executable, "-c", WRONG_NAMES], capture_output=True, text=True, check=False)
    *errors, last = done.stderr.splitlines()
    assert last == "[2, 2, 2, 2] False"
    assert all("there is no folder" in error for error in errors)


@pytest.mark.slow  # processes are started
def test_a_reader_that_goes_away_is_no_error(model: str) -> None:
    words = ["tokens", model, "--json", "--sizes", *["640x480"] * 2000]
    command = [sys.executable, "-m", "siglane.cli.main", *words]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 1


def fake_tokens(monkeypatch: pytest.MonkeyPatch, run: Any) -> list[str]:
    monkeypatch.setattr(tokens, "run", run)
    return ["tokens", "x", "--sizes", "1x1"]


def test_our_own_faults_are_one_line_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> int:
        raise ZeroDivisionError("by\nnothing")

    words = fake_tokens(monkeypatch, fails)
    assert main(words) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("siglane: error: ZeroDivisionError: by nothing (")
    assert printed.count("\n") == 1
    assert main([*words, "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_interruption_is_exit_code_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupts(*_: object) -> int:
        raise KeyboardInterrupt

    assert main(fake_tokens(monkeypatch, interrupts)) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_what_libraries_print_does_not_reach_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def chatters(_: object, out: Any) -> int:
        print("Loading...")
        logging.getLogger("siglane").warning("careful")
        out.write("[]\n")
        return 0

    assert main(fake_tokens(monkeypatch, chatters)) == 0
    printed = capsys.readouterr()
    assert printed.out == "[]\n"
    assert "Loading..." in printed.err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert "SIGLANE_DEBUG" in capsys.readouterr().out


def test_doctor_reports_and_its_exit_code_follows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "GEMM_SECONDS", 0.01)
    monkeypatch.setenv("SIGLANE_MAX_TOKEN", "3")
    code = main(["doctor", "--json"])
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    checks = {check["name"]: check for check in found["checks"]}
    assert {"python", "torch", "transformers", "cpu", "memory", "model cache", "vision attention", "fewer bits"} <= set(
        checks
    )
    assert all(checks[name]["status"] == "ok" for name in ("python", "torch", "pillow", "vision attention"))
    assert checks["fewer bits"]["status"] == ("ok" if has_integer_products() else "note")
    assert checks["SIGLANE_MAX_TOKEN"] == {
        "name": "SIGLANE_MAX_TOKEN",
        "status": "note",
        "detail": "is set, but no siglane command reads it",
    }
    broken = [check["name"] for check in found["checks"] if check["status"] == "broken"]
    assert found["ok"] == (not broken)
    assert code == (1 if broken else 0)
    assert all(name in printed.err for name in broken)


def test_doctor_says_how_much_memory_macos_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has neither /proc nor SC_AVPHYS_PAGES."""

    def sysconf(name: str) -> int:
        return {"SC_PAGE_SIZE": 1 << 14, "SC_PHYS_PAGES": 1 << 20}[name]

    monkeypatch.setattr(doctor, "MEMINFO", Path("/nowhere/meminfo"))
    monkeypatch.setattr(os, "sysconf", sysconf)
    (check,) = doctor._memory()
    assert (check.status, check.detail) == ("ok", "16.0 GiB in all")


def test_doctor_names_what_is_broken(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "GEMM_SECONDS", 0.01)
    monkeypatch.setattr(
        doctor, "requires", lambda _: ["pillow>=999", "a-package-nobody-has>=1", "x>=1; extra == 'server'"]
    )
    assert main(["doctor"]) == 1
    printed = capsys.readouterr()
    assert "siglane needs >=999; pip install 'pillow>=999'" in printed.err
    assert "not installed; pip install 'a-package-nobody-has>=1'" in printed.err
    assert "BROKEN  pillow" in printed.out


@pytest.mark.slow
def test_the_demo_asks_a_real_server_and_gets_the_right_answer() -> None:
    example = demo.load_example()
    answer = run("demo")
    assert answer.returncode == 0, answer.stderr
    assert f"picture   {example.picture}\nquestion  {example.question}\nanswer    {example.answer}\n" in answer.stdout
    assert answer.stdout.splitlines()[-1].startswith("timings   ")


@pytest.mark.slow
def test_a_demo_that_stays_prints_a_line_that_works_and_leaves_no_server_behind() -> None:
    command = [sys.executable, "-m", "siglane.cli.main", "demo", "--stay", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        line = next(line for line in process.stdout if line.startswith("curl "))
        words = shlex.split(line)
        request = urllib.request.Request(words[2], words[-1].encode(), {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            found = json.load(response)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert found["choices"][0]["message"]["content"] == demo.load_example().answer
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(words[2], timeout=5)
