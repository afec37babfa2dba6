"""The page's server lets nobody at anything but the page, and leaves nothing behind."""

import http.client
import json
import os
import re
import shutil
import signal
import socket
import sys
import uuid

import psutil
import pytest

from cmpe_se.commands.explore import images
from cmpe_se.shipped import shipped_names
from tests.commands.explore.served import free_port, look_for_the_temporary_folder_anew, served
from tests.training.processes import complaint_of, empty_folder, start, succeed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def page(folded):
    # Settings of Gradio that somebody may have in his environment, and that would open it to others.
    open_to_all = {"GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_ALLOWED_PATHS": "/", "GRADIO_SHARE": "True"}
    with served(folded, env=open_to_all) as page:
        yield page


def ask(page, path, method="GET", body=None, headers=None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(page.address.removeprefix("http://"), timeout=30)
    try:
        # Chunks that are not encoded as such would be a bad request, which the server may see first.
        connection.request(method, path, body, headers or {}, encode_chunked="Transfer-Encoding" in (headers or {}))
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def post(page, path, value) -> tuple[int, bytes]:
    return ask(page, path, "POST", json.dumps(value), {"Content-Type": "application/json"})


def upload(page, name: str, content: bytes) -> tuple[int, bytes]:
    edge = uuid.uuid4().hex
    head = f'--{edge}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
    body = head + content + f"\r\n--{edge}--\r\n".encode()
    return ask(page, "/gradio_api/upload", "POST", body, {"Content-Type": f"multipart/form-data; boundary={edge}"})


def test_the_page_is_there_for_this_machine_alone(page):
    status, content = ask(page, "/")
    assert status == 200
    assert b"cmpe-se explore" in content
    connections = psutil.Process(page.running.process.pid).net_connections("tcp")
    listening = [connection.laddr for connection in connections if connection.status == psutil.CONN_LISTEN]
    port = int(page.address.rpartition(":")[2])
    assert [(address.ip, address.port) for address in listening] == [("127.0.0.1", port)]


def test_another_name_for_this_machine_is_refused(page):
    assert ask(page, "/", headers={"Host": "attacker.example"})[0] == 400
    assert ask(page, "/", headers={"Host": "localhost"})[0] == 200


def test_another_site_in_the_same_browser_is_refused(page):
    for origin, status in (("http://attacker.example", 403), ("null", 403), (page.address, 200)):
        assert ask(page, "/", headers={"Origin": origin})[0] == status, origin
    attack = {"Origin": "http://attacker.example", "Content-Type": "multipart/form-data; boundary=x"}
    assert ask(page, "/gradio_api/upload", "POST", b"--x--", attack)[0] == 403


def test_no_file_of_this_machine(page, folded, tmp_path):
    secret = page.temporary / "secret.png"
    secret.write_bytes(b"secret")
    (folded / "secret.png").write_bytes(b"secret")
    outside = [secret, folded / "secret.png", folded / "model" / "config.json", folded / "config.yaml", "/etc/passwd"]
    home = [f"{page.temporary}/../secret.png", "config.yaml", "../../etc/passwd", "/proc/self/environ"]
    for path in [*outside, *home]:
        for route in (f"/gradio_api/file={path}", f"/gradio_api/file/{path}", f"/file={path}", f"/{path}"):
            status, content = ask(page, route.replace(" ", "%20"))
            assert status in (403, 404), route
            assert b"secret" not in content.replace(str(path).encode(), b"")
            assert b"root:" not in content
    (folded / "secret.png").unlink()


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=http://127.0.0.1:1/x",
        "/gradio_api/file=http:/127.0.0.1:1/x",
        "/gradio_api/proxy=http://127.0.0.1:1/x",
        "/gradio_api/cancel",
        "/gradio_api/process_recording",
        "/gradio_api/vibe-edit",
        "/gradio_api/run/predict",
        "/gradio_api/call/show",
        "/gradio_api/openapi.json",
        "/monitoring",
        "/docs",
        "/openapi.json",
        "/custom_component/x",
    ],
)
def test_no_other_route_of_gradio(page, path):
    for method in ("GET", "POST"):
        assert ask(page, path, method)[0] in (404, 405)


def test_long_uploads_are_refused_and_files_go_with_the_page(page):
    status, content = upload(page, "long.png", b"0" * (10 * 2**20 + 1))
    assert status == 413
    assert b"exceed" in content
    status, content = upload(page, "../../../escape.png", b"1234")
    assert status == 200
    path = json.loads(content)[0]
    assert str(page.temporary) in path
    assert os.path.realpath(path).startswith(os.path.realpath(page.temporary))
    assert ask(page, f"/gradio_api/file={path}") == (200, b"1234")


def event(page, number: int, data: list) -> list[dict]:
    """What the queue says of an event that somebody has made up."""
    session = uuid.uuid4().hex[:11]
    body = {"data": data, "fn_index": number, "session_hash": session, "event_data": None, "trigger_id": None}
    status, content = post(page, "/gradio_api/queue/join", body)
    if status != 200:
        return [{"msg": "refused", "status": status, "content": content.decode()}]
    status, content = ask(page, f"/gradio_api/queue/data?session_hash={session}")
    assert status == 200
    return [
        json.loads(line.removeprefix("data: ")) for line in content.decode().splitlines() if line.startswith("data")
    ]


@pytest.mark.parametrize("path", ["/etc/passwd", "CONFIG", "http://127.0.0.1:1/x.png", "../../../etc/passwd"])
def test_made_up_events_reach_no_other_files(page, folded, path):
    path = str(folded / "config.yaml") if path == "CONFIG" else path
    config = json.loads(ask(page, "/config")[1])
    files = {part["id"] for part in config["components"] if part["type"] == "file"}
    uploads = [call["id"] for call in config["dependencies"] if set(call["inputs"]) & files]
    assert len(uploads) == 2
    payload = {"path": path, "url": None, "orig_name": "x.png", "meta": {"_type": "gradio.FileData"}}
    said = event(page, uploads[0], [payload])
    assert "root:" not in str(said)
    assert "data_dir" not in str(said)
    assert [message["success"] for message in said if message["msg"] == "process_completed"] == [False], said


@pytest.mark.long
def test_nothing_is_left_behind(folded):
    for number in (signal.SIGINT, signal.SIGTERM):
        with served(folded) as page:
            upload(page, "x.png", b"1234")
            assert list(page.temporary.rglob("x.png"))
            done = page.end(number)
            assert done.status == 0, done.err
            assert "Traceback" not in done.err
            assert list(page.temporary.iterdir()) == []


def _keep_uploads_for_a_moment() -> None:
    look_for_the_temporary_folder_anew()
    images.UPLOADS_KEPT = 3


@pytest.mark.long
def test_uploads_are_deleted_while_the_page_goes_on(folded):
    with served(folded, before=_keep_uploads_for_a_moment) as page:
        path = json.loads(upload(page, "x.png", b"1234")[1])[0]
        assert ask(page, f"/gradio_api/file={path}") == (200, b"1234")
        page.running.until(lambda: not os.path.exists(path), timeout=60)
        assert ask(page, f"/gradio_api/file={path}")[0] in (403, 404)
        assert list(page.temporary.rglob("*.png"))  # the examples are there for the next visitor


@pytest.mark.long
def test_all_finished_runs_of_the_folder(folded, se):
    place = empty_folder()
    (place / "runs" / "unfinished").mkdir(parents=True)
    (place / "runs" / "unfinished" / "config.yaml").write_text((folded / "config.yaml").read_text())
    for name, target in (("first", se), ("second", folded)):
        os.symlink(target, place / "runs" / name)
    (place / "runs" / "without settings").mkdir()
    (place / "runs" / "without settings" / "result.json").write_text("{}")
    shutil.copytree(folded, place / "runs" / "newest")
    (place / "runs" / "newest" / "model" / "model.safetensors").unlink()
    os.utime(place / "runs" / "newest" / "result.json")
    proxy = {"HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}  # where nobody is
    with served(cwd=place, env=proxy) as page:
        names = re.search(r"(.*): http", (page.running.folder / "out").read_text()).group(1)
        said = page.running.err
    own, brought = names.split(", ")[:2], names.split(", ")[2:]
    assert sorted(own) == ["first", "second"]
    assert brought == shipped_names()
    assert "left out: runs/without settings is no run folder" in said
    assert "left out: runs/newest holds no trained model" in said


def test_without_any_run_there_are_those_of_the_package():
    with served() as page:
        names = re.search(r"(.*): http", (page.running.folder / "out").read_text()).group(1)
    assert names.split(", ") == shipped_names()


def test_mistakes(folded):
    port = free_port()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        assert complaint_of("explore", folded, "--port", port) == (
            f"cmpe-se: error: port {port} is taken or not allowed; name another with --port"
        )
    assert "port is 70000, should be from 1 to 65535" in complaint_of("explore", folded, "--port", 70000)
    assert "nowhere is no run folder" in complaint_of("explore", folded, "nowhere")
    unfinished = empty_folder()
    (unfinished / "config.yaml").write_text((folded / "config.yaml").read_text())
    assert "has not finished" in complaint_of("explore", unfinished)


def _without_gradio() -> None:
    sys.modules["gradio"] = None


def test_a_missing_package(folded):
    done = start("explore", folded, before=_without_gradio).wait()
    assert "needs captum, gradio and jinja2; pip install 'cmpe-se[explore]'" in done.complaint


def test_help():
    said = " ".join(succeed("explore", "--help").out.split())  # lines are wrapped
    assert "Serve a page for exploring finished runs on this machine" in said
    assert "all finished ones in runs/, the newest first, and after them those of the package" in said


def dependencies(page) -> list[dict]:
    return json.loads(ask(page, "/config")[1])["dependencies"]


def shows(page) -> tuple[int, list]:
    """Number of the event that shows everything, and values that it takes."""
    parts = json.loads(ask(page, "/config")[1])["components"]
    run = next(part["props"]["value"] for part in parts if part["props"].get("label") == "Network")
    return 0, ["One", run, run, None, None, 1, "as trained", 0, "Grad-CAM at this block"]


def last(said: list[dict]) -> dict:
    return next(message for message in said if message["msg"] in ("process_completed", "refused"))


@pytest.mark.parametrize(
    "origin", ["http://[::1", "http://[x]:y", "http://a:99999999", "x", "http://127.0.0.1 evil", ""]
)
def test_an_origin_that_is_no_address_is_refused(page, origin):
    status, words = ask(page, "/", headers={"Origin": origin})
    assert (status, words) == (403, b"requests of other sites are refused")
    assert "Traceback" not in page.running.err


@pytest.mark.parametrize("number", [9999, -1, None, "x", 1.5, True, [], {}])
def test_events_that_the_page_does_not_have_are_answered_in_words(page, number):
    refused = last(event(page, number, []))
    assert (refused["status"], refused["content"]) == (400, "the page has nothing like that; load it again")
    assert "Traceback" not in page.running.err


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff", b'{"fn_index": 0}', b"[" * 100_000])
def test_questions_that_are_none_are_answered_in_words(page, body):
    status, words = ask(page, "/gradio_api/queue/join", "POST", body, {"Content-Type": "application/json"})
    assert (status, words) == (400, b"the page has nothing like that; load it again")
    status, _ = ask(page, "/gradio_api/queue/join", "POST", b" " * (2**20 + 1))
    assert status == 413
    assert "Traceback" not in page.running.err


@pytest.mark.long
def test_values_of_another_type_are_answered_in_words(page):
    number, values = shows(page)
    assert last(event(page, number, values))["success"]
    for place in range(len(values)):
        for bad in ("<b>x</b>", [], {}, -5, 10**30, None):
            answer = last(event(page, number, [*values[:place], bad, *values[place + 1 :]]))
            if not answer["success"]:
                assert answer["output"]["error"], (place, bad)
                assert "<b>" not in answer["output"]["error"]
    for each in dependencies(page):
        for data in ([], ["x"] * len(each["inputs"]), [{}] * len(each["inputs"])):
            answer = last(event(page, each["id"], data))
            assert answer["success"] or answer["output"]["error"], (each["id"], data)
    assert "Traceback" not in page.running.err


@pytest.mark.long
def test_an_answer_that_nobody_waits_for_is_not_computed(page):
    number, values = shows(page)
    body = {"data": [*values[:-1], "Integrated gradients"], "fn_index": number, "event_data": None, "trigger_id": None}
    for guest in range(30):
        assert post(page, "/gradio_api/queue/join", body | {"session_hash": f"gone{guest}"})[0] == 200
    answer = last(event(page, number, values))
    assert answer["success"]
    status, content = ask(page, "/gradio_api/queue/data?session_hash=gone29")
    assert status == 200
    assert b"nobody waits for this answer" in content  # the last one was too late


def _keep_few_uploads() -> None:
    look_for_the_temporary_folder_anew()
    from cmpe_se.commands.explore import serving

    serving._MOST_UPLOADS, serving._UPLOADED = 3, 10_000


@pytest.mark.long
def test_uploads_are_limited_in_number_and_size(folded):
    with served(folded, before=_keep_few_uploads) as page:
        assert upload(page, "x.png", b"0" * 9_000)[0] == 200
        status, words = upload(page, "x.png", b"0" * 9_000)
        assert status == 429
        assert b"too many uploads: 1 file of 0 MB kept" in words
        assert [upload(page, "x.png", content)[0] for content in (b"1", b"2", b"3")] == [200, 200, 429]
        assert len(list(page.temporary.rglob("x.png"))) == 3
    with served(folded, before=_keep_few_uploads) as page:
        edge = uuid.uuid4().hex
        part = f'--{edge}\r\nContent-Disposition: form-data; name="files"; filename="y.png"\r\n\r\n{{}}\r\n'
        body = "".join(part.format(number) for number in range(5)) + f"--{edge}--\r\n"
        several = {"Content-Type": f"multipart/form-data; boundary={edge}"}
        assert ask(page, "/gradio_api/upload", "POST", body.encode(), several)[0] == 200
        assert upload(page, "x.png", b"1")[0] == 429  # all five count
        chunked = several | {"Transfer-Encoding": "chunked"}
        assert ask(page, "/gradio_api/upload", "POST", iter([b"x"]), chunked)[0] == 411
        assert "Traceback" not in page.running.err
