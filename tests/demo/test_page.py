"""What the server gives to clients that are no browsers."""

import json
from typing import Any

import pytest
import requests
from PIL import Image

pytest.importorskip("gradio", reason="the page needs gradio")


@pytest.fixture(scope="module")
def address():
    from hf_robust_clip.demo.command import open_page

    page = open_page(["--radius", "24/255", "--examples", "2", "--defence", "TTC"])
    yield page.serve(wait=False).rstrip("/")
    page.blocks.close()


def asked(address: str, picture: dict[str, Any] | None, classes: str = "one, seven") -> dict[str, Any]:
    """What the server answers to a click on Attack."""
    functions = requests.get(f"{address}/config", timeout=60).json()["dependencies"]
    (look,) = [own["id"] for own in functions if own["api_name"] == "look"]
    data = [picture, classes, "the {}", "", "pgd-20", 3, 8, "none", True]
    joined = {"data": data, "fn_index": look, "session_hash": "client"}
    requests.post(f"{address}/gradio_api/queue/join", json=joined, timeout=60).raise_for_status()
    where = {"session_hash": "client"}
    with requests.get(f"{address}/gradio_api/queue/data", params=where, stream=True, timeout=120) as lines:
        for line in lines.iter_lines():
            if line.startswith(b"data:") and (told := json.loads(line[5:]))["msg"] == "process_completed":
                return told
    raise AssertionError("the server ended without an answer")


def file_at(path: str) -> dict[str, Any]:
    return {"path": path, "orig_name": "x.png", "meta": {"_type": "gradio.FileData"}}


def test_nothing_is_read_but_uploads(address, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    content = (tmp_path / "x.png").read_bytes()
    (uploaded,) = requests.post(f"{address}/gradio_api/upload", files={"files": ("x.png", content)}, timeout=60).json()
    seen = asked(address, file_at(uploaded))
    assert seen["success"] and "PGD-3 at 8/255" in seen["output"]["data"][0]
    for place in (str(tmp_path / "x.png"), "/etc/passwd", f"{address}/config", "file:///etc/passwd"):
        refused = asked(address, file_at(place))
        assert not refused["success"] and not refused["output"].get("data")


def test_files_of_the_host_are_not_given(address):
    for place in ("/etc/passwd", "pyproject.toml", "%2Fetc%2Fpasswd", "../pyproject.toml", "/proc/self/environ"):
        answer = requests.get(f"{address}/gradio_api/file={place}", timeout=60)
        assert answer.status_code in (403, 404), place


def test_names_of_visitors_are_text(address, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "y.png")
    content = (tmp_path / "y.png").read_bytes()
    (uploaded,) = requests.post(f"{address}/gradio_api/upload", files={"files": ("y.png", content)}, timeout=60).json()
    _, plain, defended = asked(address, file_at(uploaded), "<script>alert(1)</script>, seven")["output"]["data"]
    assert "Without a defence" in plain and "With the defence" in defended
    assert "&lt;script&gt;" in plain and "<script" not in plain + defended
