"""Publishing over loopback, through the real huggingface_hub client: one commit or none."""

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from hub_repos import Blob
from hub_server import HubServer, serve
from publishing import CARD, REPO, TOKEN, at, client, content, finish, sent
from publishing import encoder as encoder
from publishing import made as made
from publishing import server as server
from safetensors.torch import load_file, save_file

from encoders import manifest
from encoders.errors import ModelError, UsageError
from encoders.publish import hub


def test_one_private_commit_that_downloads_as_the_same_artifact(server: HubServer, encoder: Path) -> None:
    plan = hub.publish(encoder, REPO)
    repo = server.repos[REPO]
    assert repo.private
    assert len(repo.history) == 2  # as made, and this commit
    assert at(server) == content(encoder)
    assert plan.commit is not None
    assert repo.refs["main"] in plan.commit
    assert plan.files == {name: len(raw) for name, raw in at(server).items()}

    fetched = Path(huggingface_hub.snapshot_download(REPO, token=TOKEN))
    seal = manifest.verify(fetched, full=True)
    assert (seal.kind, seal.created) == ("encoder", "")
    assert seal.config == {"source": "encoder", "objective": "clips"}  # a name, no path
    assert seal.parents["source"].path == "config.json"
    with pytest.raises(huggingface_hub.errors.RepositoryNotFoundError):
        huggingface_hub.HfApi().model_info(REPO, token=False)


def test_publishing_again_sends_nothing(server: HubServer, encoder: Path, tmp_path: Path) -> None:
    hub.publish(encoder, REPO)
    before = len(sent(server))
    again = finish(Path(shutil.copytree(encoder, tmp_path / "again")), source="/elsewhere/encoder", objective="clips")
    plan = hub.publish(again, REPO)
    assert (plan.upload, plan.delete, plan.commit) == ((), (), None)
    assert len(sent(server)) == before


def test_only_what_changed_is_sent_and_old_files_of_ours_go(server: HubServer, encoder: Path) -> None:
    (encoder / "merges.txt").write_text("old")
    hub.publish(finish(encoder), REPO)
    files = server.repos[REPO].files("main") | {"USE.md": Blob(b"theirs", lfs=False)}
    server.repos[REPO].commit("main", files)
    (encoder / "merges.txt").unlink()
    (encoder / "README.md").write_text(CARD + "Edited by hand, after the export.\n")
    with pytest.raises(ModelError, match=r"merges\.txt is missing"):
        hub.publish(encoder, REPO)
    plan = hub.publish(finish(encoder), REPO)
    assert set(plan.upload) == {"README.md", "manifest.json"}
    assert plan.delete == ("merges.txt",)
    assert server.count("PUT", "/storage/") == -(-(encoder / "model.safetensors").stat().st_size // server.part)
    assert at(server) == content(encoder) | {"USE.md": b"theirs"}


def test_a_dry_run_lists_everything_and_sends_nothing(
    server: HubServer, encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = hub.publish(encoder, REPO, dry_run=True)
    assert sent(server) == []
    assert not server.repos
    printed = capsys.readouterr().out
    assert "dry run: nothing was sent" in printed
    for name, raw in content(encoder).items():
        assert plan.files[name] == len(raw)
        assert f"{len(raw):,} B  {name}" in printed


def test_a_pull_request_leaves_main_alone(server: HubServer, encoder: Path) -> None:
    hub.publish(encoder, REPO)
    old = at(server)
    (encoder / "README.md").write_text(CARD + "New.\n")
    plan = hub.publish(encoder, REPO, create_pr=True)
    assert plan.commit is not None
    assert plan.commit.endswith("/discussions/1")
    assert at(server) == old
    assert at(server, "refs/pr/1")["README.md"] == (encoder / "README.md").read_bytes()


def test_who_may_see_it_is_never_changed(server: HubServer, encoder: Path) -> None:
    hub.publish(encoder, REPO, public=True)
    assert not server.repos[REPO].private
    with pytest.raises(UsageError, match="exists and is public; pass --public"):
        hub.publish(encoder, REPO)


def test_what_others_put_there_is_not_overwritten(server: HubServer, encoder: Path) -> None:
    api = huggingface_hub.HfApi(token=TOKEN)
    api.create_repo(REPO)
    api.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id=REPO)
    with pytest.raises(UsageError, match=r"did not publish \(config\.json\)"):
        hub.publish(encoder, REPO)
    other = json.dumps(json.loads(content(encoder)["manifest.json"]) | {"kind": "llava"}).encode()
    api.upload_file(path_or_fileobj=other, path_in_repo="manifest.json", repo_id=REPO)
    with pytest.raises(UsageError, match="holds a published 'llava', not 'encoder'"):
        hub.publish(encoder, REPO)
    api.upload_file(path_or_fileobj=b"*.safetensors", path_in_repo=".gitignore", repo_id=REPO)
    with pytest.raises(UsageError, match="may drop files silently"):
        hub.publish(encoder, REPO)


NO_MANIFESTS = [b"[1]", b"{", b'"x"', b'{"kind": "encoder", "files": null}', b'{"kind": "encoder", "files": {"a": 1}}']


@pytest.mark.parametrize("theirs", NO_MANIFESTS)
def test_a_manifest_that_is_none_of_ours_is_what_others_put_there(
    server: HubServer, encoder: Path, theirs: bytes
) -> None:
    huggingface_hub.HfApi(token=TOKEN).create_repo(REPO)
    server.repos[REPO].commit("main", {"manifest.json": Blob(theirs, lfs=False)})
    with pytest.raises(UsageError, match=r"did not publish \(manifest\.json\)"):
        hub.publish(encoder, REPO)
    assert at(server) == {"manifest.json": theirs}


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("name", ["README.md", "LICENSE"])
def test_what_was_edited_there_is_not_overwritten(server: HubServer, encoder: Path, published: bool, name: str) -> None:
    (encoder / "LICENSE").write_text("old")
    if published:
        hub.publish(encoder, REPO)
    else:
        huggingface_hub.HfApi(token=TOKEN).create_repo(REPO, private=True)
    edited = CARD.encode() + b"Edited in the browser.\n"
    server.repos[REPO].commit("main", server.repos[REPO].files("main") | {name: Blob(edited, lfs=False)})
    before = at(server)
    with pytest.raises(UsageError, match=f"holds a {name} that was not published from here"):
        hub.publish(encoder, REPO)
    assert at(server) == before
    (encoder / name).write_bytes(edited)  # one way out; the other is to delete it there
    hub.publish(encoder, REPO)
    assert at(server)[name] == edited


def test_files_that_the_manifest_there_does_not_name_are_not_replaced(server: HubServer, encoder: Path) -> None:
    hub.publish(encoder, REPO)
    seal, files = json.loads(at(server)["manifest.json"]), server.repos[REPO].files("main")
    for name in ("config.json", "model.safetensors"):  # of git, and of LFS
        listed = {n: entry for n, entry in seal["files"].items() if n != name}
        manifest_there = Blob(json.dumps(seal | {"files": listed}).encode(), lfs=False)
        there = {name: Blob(b"theirs", lfs=name == "model.safetensors"), "manifest.json": manifest_there}
        server.repos[REPO].commit("main", files | there)
        with pytest.raises(UsageError, match=f"holds a {name} that was not published from here"):
            hub.publish(encoder, REPO)


@pytest.mark.parametrize("token", [None, "hf_" + "wrong" * 7])
@pytest.mark.parametrize("dry_run", [False, True])
def test_without_a_login_that_may_write_it_says_so(
    server: HubServer, encoder: Path, monkeypatch: pytest.MonkeyPatch, token: str | None, dry_run: bool, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(hub.HubError, match="log in with `hf auth login` or set HF_TOKEN") as raised:
        hub.publish(encoder, REPO, dry_run=dry_run)
    assert raised.value.exit_code == 7
    assert sent(server) == []


def test_a_card_that_the_hub_refuses_leaves_no_repository(server: HubServer, encoder: Path) -> None:
    (encoder / "README.md").write_text(CARD.replace("apache-2.0", "nonsense"))
    with pytest.raises(ModelError, match="refuses the metadata of README.md"):
        hub.publish(encoder, REPO)
    assert server.repos == {}


def test_a_card_names_the_repository_it_is_published_as(server: HubServer, encoder: Path) -> None:
    (encoder / "README.md").write_text(CARD + 'name = "ORG/NAME"\n')
    hub.publish(encoder, REPO)
    assert at(server)["README.md"].decode() == CARD + f'name = "{REPO}"\n'
    assert hub.publish(encoder, REPO).upload == ()


@pytest.mark.parametrize("name", ["encoder", "a/b/c", "a/b c", "/x", "a/.."])
def test_a_name_that_the_hub_has_not_is_refused(server: HubServer, encoder: Path, name: str) -> None:
    with pytest.raises(UsageError, match="does not name a repository"):
        hub.publish(encoder, name)
    assert server.log == []


def test_an_upload_that_fails_without_a_cause_says_what_happened(
    server: HubServer, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("xet gave up")

    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", fail)
    with pytest.raises(
        hub.HubError, match=rf"`publish-model \S+ {REPO}` finds out and finishes \(RuntimeError: xet gave"
    ):
        hub.publish(encoder, REPO)


def troubled(server: HubServer, encoder: Path) -> tuple[dict[str, bytes], dict[str, bytes], list[tuple[str, str]]]:
    """Publish a first version; return old and new content and what publishing the new one asks for."""
    hub.publish(encoder, REPO)
    old = at(server)
    state = load_file(encoder / "model.safetensors")
    state["vision_model.post_layernorm.bias"] += 1
    save_file(state, encoder / "model.safetensors", metadata={"format": "pt"})
    (encoder / "README.md").write_text(CARD + "Version two.\n")
    finish(encoder, source="encoder", objective="clips")
    with serve(TOKEN) as rehearsal:
        rehearsal.repos[REPO], rehearsal.objects = server.repos[REPO], dict(server.objects)
        api = huggingface_hub.HfApi(endpoint=rehearsal.url, token=TOKEN)
        additions = [huggingface_hub.CommitOperationAdd(name, raw) for name, raw in content(encoder).items()]
        api.create_commit(REPO, additions, commit_message="rehearsal", create_pr=True)
        asked = list(dict.fromkeys(sent(rehearsal)))
    return old, content(encoder), [(method, path.replace("refs/pr/1", "main")) for method, path in asked]


@pytest.mark.parametrize("what", [500, 429, 409, "cut", "cut after"])
def test_every_request_may_fail_and_the_repository_is_old_or_new(server: HubServer, encoder: Path, what: Any) -> None:
    old, new, asked = troubled(server, encoder)
    assert {path.split("/")[1] for _, path in asked} >= {"api", "storage", "verify"}
    assert any("/commit/" in path for _, path in asked)
    clean = dict(server.repos[REPO].commits), dict(server.repos[REPO].refs), list(server.repos[REPO].history)
    objects = dict(server.objects)
    for broken in asked:
        repo = server.repos[REPO]
        repo.commits, repo.refs, repo.history, server.objects = (
            *map(type(clean[0]), clean[:2]),
            [*clean[2]],
            dict(objects),
        )
        server.trouble = lambda method, path, before, broken=broken: what if (method, path) == broken else None
        with suppress(hub.HubError):
            hub.publish(encoder, REPO)
            assert at(server) == new, broken  # it said so
        server.trouble = lambda method, path, before: None
        hub.publish(encoder, REPO)  # the same command again
        assert at(server) == new
        states = [{n: raw for n, raw in state.items() if n != ".gitattributes"} for state in repo.history[1:]]
        assert states == [old, new], broken


@pytest.mark.parametrize("what", [500, 429, 409, "cut", "cut after"])
def test_the_first_publication_may_fail_anywhere_too(encoder: Path, server: HubServer, what: Any) -> None:
    hub.publish(encoder, REPO)
    asked, new = list(dict.fromkeys(sent(server))), at(server)
    assert ("POST", "/api/repos/create") in asked
    for broken in asked:
        server.repos.clear()
        server.objects.clear()
        server.trouble = lambda method, path, before, broken=broken: what if (method, path) == broken else None
        with suppress(hub.HubError):
            hub.publish(encoder, REPO)
            assert at(server) == new, broken
        server.trouble = lambda method, path, before: None
        hub.publish(encoder, REPO)
        assert at(server) == new
        assert server.repos[REPO].private
        assert len(server.repos[REPO].history) == 2, broken  # as made, and this commit


@pytest.mark.parametrize("what", [500, 429, "cut"])
def test_a_passing_failure_of_an_upload_is_retried(server: HubServer, encoder: Path, what: Any) -> None:
    server.trouble = lambda method, path, before: what if "/storage/" in path and before == 0 else None
    hub.publish(encoder, REPO)
    assert at(server) == content(encoder)


def test_a_commit_in_between_is_not_overwritten(server: HubServer, encoder: Path) -> None:
    _, _, _ = troubled(server, encoder)
    repo = server.repos[REPO]

    def interfere(method: str, path: str, before: int) -> None:
        if path.endswith("/commit/main") and len(repo.history) == 2:
            repo.commit("main", repo.files("main") | {"README.md": Blob(b"theirs", lfs=False)})

    server.trouble = interfere
    with pytest.raises(hub.HubError, match="A commit has happened since"):
        hub.publish(encoder, REPO)
    assert at(server)["README.md"] == b"theirs"


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_killed_at_any_point_it_leaves_the_old_or_the_new_commit(
    server: HubServer, encoder: Path, tmp_path: Path
) -> None:
    old, new, asked = troubled(server, encoder)
    for point in ("/preupload/", "/objects/batch", "/storage/", "/verify", "/commit/"):
        assert any(point in path for _, path in asked)
        process: list[subprocess.Popen[str]] = []

        def kill(method: str, path: str, before: int, point: str = point, process: Any = process) -> str | None:
            if point not in path or process[0].poll() is not None:
                return None
            process[0].send_signal(signal.SIGKILL)
            process[0].wait()
            return "cut" if point != "/commit/" else None

        server.trouble = kill  # type: ignore[assignment]
        process.append(client(server, tmp_path, "-m", "llava_adapter.publish", str(encoder), REPO))
        process[0].communicate(timeout=300)
        assert process[0].returncode == -signal.SIGKILL
        if point == "/commit/":  # the request had arrived whole, and the server may still be at it
            wait_for(lambda: len(server.repos[REPO].history) == 3)
        assert at(server) == (new if point == "/commit/" else old), point
    assert len(server.repos[REPO].history) == 3
