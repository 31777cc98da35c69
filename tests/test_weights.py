from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file

from pcd.encoders.weights import describe_file, find_weights, read_state, state_digest
from pcd.errors import WeightsError
from pcd.fingerprint import file_digest

STATE = {"visual.proj": torch.arange(6.0).reshape(2, 3), "visual.bias": torch.tensor([1.5, -2.0], dtype=torch.float16)}


def write(path: Path, content: Any) -> Path:
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in STATE.items()}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.safetensors", STATE),
        ("a.pt", STATE),
        ("a.pth", {"epoch": 3, "state_dict": prefixed("module.")}),
        ("a.bin", {"state_dict": STATE, "name": "x"}),
        ("b.safetensors", prefixed("module.")),
    ],
)
def test_state_dicts_are_read_whatever_they_are_wrapped_in(tmp_path, name, content):
    state = read_state(write(tmp_path / name, content))
    assert state.keys() == STATE.keys()
    for key, value in STATE.items():
        assert state[key].dtype == value.dtype
        assert torch.equal(state[key], value)


class Trap:
    """Touches a file when it is unpickled, which is what a hostile checkpoint would do."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def test_a_checkpoint_that_runs_code_is_refused_and_does_not_run(tmp_path):
    file = write(tmp_path / "evil.pt", {"state_dict": STATE, "args": Trap(tmp_path / "marker")})
    with pytest.raises(WeightsError, match=r"evil\.pt .* cannot be read as weights alone"):
        read_state(file)
    assert not (tmp_path / "marker").exists()


def test_torchscript_is_refused_with_a_way_out(tmp_path):
    with zipfile.ZipFile(tmp_path / "ViT-B-16.pt", "w") as archive:  # the parts by which torch.load knows one
        archive.writestr("archive/constants.pkl", b"\x80\x02).")
        archive.writestr("archive/version", b"3\n")
    with pytest.raises(WeightsError, match=r"ViT-B-16\.pt is a TorchScript archive .*dict\(torch\.jit\.load\(FILE, 'cpu'\)"):
        read_state(tmp_path / "ViT-B-16.pt")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("damage", ["empty", "cut", "text"])
def test_damaged_files(tmp_path, suffix, damage):
    file = write(tmp_path / f"weights{suffix}", STATE)
    whole = file.read_bytes()
    file.write_bytes(
        {"empty": b"", "cut": whole[: len(whole) // 2], "text": b"version https://git-lfs.github.com/spec/v1\n"}[damage]
    )
    with pytest.raises(WeightsError, match=r"weights\S+ \([\d,]+ bytes\) cannot be read as weights alone: .+fetch it again"):
        read_state(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([STATE], "holds a list; expected a state dict"),
        ({}, "holds nothing"),
        ({**STATE, "epoch": 3}, "no state dict: epoch hold no"),
    ],
)
def test_checkpoints_that_are_no_state_dict(tmp_path, content, message):
    with pytest.raises(WeightsError, match=message):
        read_state(write(tmp_path / "a.pt", content))


def test_find_weights(tmp_path, monkeypatch):
    file = write(tmp_path / "a.safetensors", STATE)
    assert find_weights(file) == find_weights(str(file)) == file
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_weights("~/a.safetensors") == file
    with pytest.raises(WeightsError, match=r"b\.pt is not there; give auto, random or the path"):
        find_weights(tmp_path / "b.pt")
    with pytest.raises(WeightsError, match="is a folder"):
        find_weights(tmp_path)
    (tmp_path / "a.npz").touch()
    with pytest.raises(WeightsError, match=r"files of kind '\.npz' are not read; expected \.safetensors / \.pt"):
        find_weights(tmp_path / "a.npz")


def test_a_file_is_described_without_its_folder(tmp_path):
    file = write(tmp_path / "a.safetensors", STATE)
    os.utime(file, ns=(1, 1_700_000_000_123_456_789))
    described = describe_file(file)
    assert described == {"name": "a.safetensors", "size": len(file.read_bytes()), "mtime_ns": 1_700_000_000_123_456_789}
    assert json.loads(json.dumps(described)) == described


def test_state_digest_sees_everything_but_the_order_of_keys():
    base = state_digest(STATE)
    assert state_digest(dict(reversed(STATE.items()))) == base
    assert state_digest({key: value.clone() for key, value in STATE.items()}) == base
    assert state_digest({**STATE, "visual.proj": STATE["visual.proj"].T.contiguous().T}) == base  # other strides, same values
    changed = [
        {**STATE, "visual.proj": STATE["visual.proj"] + torch.tensor([0.0, 0.0, 1e-6])},
        {**STATE, "visual.proj": STATE["visual.proj"] * torch.tensor([-1.0, 1.0, 1.0])},  # a zero becomes -0.0
        {**STATE, "visual.proj": STATE["visual.proj"].reshape(3, 2)},
        {**STATE, "visual.proj": STATE["visual.proj"].view(torch.int32)},
        {**STATE, "visual.bias": STATE["visual.bias"].view(torch.bfloat16)},
        prefixed("x"),
        {"visual.proj": STATE["visual.proj"]},
    ]
    assert len({base, *(state_digest(state) for state in changed)}) == 1 + len(changed)


class Hub(BaseHTTPRequestHandler):
    """As much of a model hub as hf_hub_download needs: HEAD with commit, ETag and size, and GET."""

    files: ClassVar[dict[str, bytes]] = {}
    status: ClassVar[int] = 404
    asked: ClassVar[list[str]] = []

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.wfile.write(self.answer())

    def answer(self) -> bytes:
        if "/someone/" in self.path:  # the library has other questions too
            self.asked.append(f"{self.command} {self.path}")
        content = self.files.get(self.path)
        self.send_response(200 if content is not None else self.status)
        if content is None and self.status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{hashlib.sha1(content or b"", usedforsecurity=False).hexdigest()}"')
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        return content or b""

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Hub.files, Hub.status, Hub.asked = {}, 404, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


FETCH = """
from pcd.encoders.weights import fetch_published
from pcd.errors import PcdError
try:
    print(fetch_published("M/tag", "someone/model", ["w.safetensors", "w.bin"]))
except PcdError as error:
    print("ERROR", error.exit_code, error)
"""


def fetch(tmp_path: Path, endpoint: str, **environment: str) -> tuple[str, str]:
    """Output and error output of fetching in a fresh process with an empty cache: the hub library reads its settings once."""
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "*"}
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", FETCH], env={**kept, **settings, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip(), done.stderr.strip()


def test_published_weights_are_downloaded_once(tmp_path, hub):
    Hub.files = {"/someone/model/resolve/main/w.bin": b"weights"}  # no safetensors: the second name is taken
    out, _ = fetch(tmp_path, hub)
    assert Path(out).read_bytes() == b"weights"
    assert file_digest(Path(out)) == hashlib.sha256(b"weights").hexdigest()
    asked = len(Hub.asked)
    assert asked >= 3
    assert fetch(tmp_path, hub)[0] == out  # from the cache
    assert fetch(tmp_path, hub, HF_HUB_OFFLINE="1")[0] == out
    assert len(Hub.asked) == asked


@pytest.mark.parametrize(
    ("status", "offline", "reason"),
    [
        (None, "", "refused"),
        (None, "1", "HF_HUB_OFFLINE is set"),
        (404, "", "someone/model holds neither of w.safetensors, w.bin"),
        (503, "", "503"),
    ],
)
def test_no_weights_is_one_line_that_says_what_to_do(tmp_path, hub, status, offline, reason):
    Hub.status = status or 404
    endpoint = hub if status else "http://127.0.0.1:9"  # nobody listens there
    out, err = fetch(tmp_path, endpoint, HF_HUB_OFFLINE=offline)
    assert err == ""
    assert len(out.splitlines()) == 1
    assert out.startswith("ERROR 2 Weights M/tag are not on this machine and could not be fetched (")
    assert reason in out
    assert f"Download w.safetensors from {endpoint}/someone/model and pass --weights PATH" in out
    assert len(Hub.asked) <= 2  # no retries


def test_asking_what_there_is_needs_neither_torch_nor_the_hub(tmp_path):
    file = write(tmp_path / "w.pt", STATE)
    script = (
        "import sys; from pcd.encoders import registry, request_of; "
        f"print(request_of('openclip', {{'weights': {str(file)!r}}})['file']['size'] > 0, registry.names()); "
        "import pcd.encoders.weights, pcd.device; "
        "sys.exit(' '.join({'torch', 'open_clip', 'huggingface_hub', 'safetensors'} & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == "True ['folder', 'openclip', 'pixels', 'sam', 'timm']"
