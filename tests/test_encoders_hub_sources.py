"""Encoders of others on the Hub: of one commit, only what is needed, and later without a network."""

import errno
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from hub_server import HubServer
from publishing import server as server
from source_folders import (
    BOUND,
    CAPTIONS,
    CLIPS,
    SIZE,
    SQUASH,
    TOKENS,
    check_image_side,
    config_of,
    relative,
    write_clip,
    write_open_clip,
    write_tokenizer,
)

from encoders.errors import ModelError
from encoders.sources.source import open_source


def upload(folder: Path, repo: str) -> None:
    client = huggingface_hub.HfApi()
    client.create_repo(repo)
    client.upload_folder(repo_id=repo, folder_path=folder)


def test_published_clips_weights_from_the_hub(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one commit, config and weights, but not the second copy of the weights; the tokenizer from where the config
    says; then all of it again without a network."""
    repo = "lab/clips"
    (tmp_path / "words").mkdir()
    tokenizer = write_tokenizer(tmp_path / "words", "bert")
    upload(tmp_path / "words", "lab/words")
    given = CLIPS | {"text_cfg": CLIPS["text_cfg"] | {"hf_tokenizer_name": "lab/words"}}
    model = write_open_clip(tmp_path / "published", config_of(given), SQUASH)
    (tmp_path / "published" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    torch.save(model.state_dict(), tmp_path / "published" / "open_clip_pytorch_model.bin")
    upload(tmp_path / "published", repo)
    commit = server.repos[repo].refs["main"]
    for revision in (None, commit):
        source = open_source(repo, revision=revision)
        assert (source.provenance["base_model"], source.provenance["commit"]) == (repo, commit)
        assert (source.provenance["license"], source.family) == ("apache-2.0", "clips")
        assert source.provenance["notes"] == []
        check_image_side(source, model)
        assert source.tokenizer.encode(CAPTIONS[1], TOKENS) == tokenizer.encode(CAPTIONS[1], TOKENS)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fetched = {file.name for file in source.parents["source"].iterdir()}
    assert "open_clip_model.safetensors" in fetched
    assert "open_clip_pytorch_model.bin" not in fetched
    with pytest.raises(ModelError, match="lab/other is neither on this machine nor to be had from the Hub"):
        open_source("lab/other")


@torch.no_grad()
def test_shards_and_pickles_from_the_hub(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_clip(tmp_path / "shards")
    (tmp_path / "shards" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    upload(tmp_path / "shards", "lab/shards")
    theirs = write_open_clip(tmp_path / "pickle", config_of({}))
    (tmp_path / "pickle" / "open_clip_model.safetensors").unlink()
    torch.save(theirs.state_dict(), tmp_path / "pickle" / "open_clip_pytorch_model.bin")
    upload(tmp_path / "pickle", "lab/pickle")
    for offline in (False, True):  # and then without the file that comes first, which nobody has
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        check_image_side(open_source("lab/pickle"), theirs)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    pixels = torch.randn(1, 3, SIZE, SIZE)
    found = open_source("lab/shards").tower.model(pixels).last_hidden_state
    assert relative(found, model.vision_model(pixels).last_hidden_state) <= BOUND


def test_a_damaged_card_or_index_on_the_hub_and_a_full_disk(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_clip(tmp_path / "card")
    (tmp_path / "card" / "README.md").write_text("---\nlicense: other\nlicense_name: ours\n---\n")
    upload(tmp_path / "card", "lab/card")
    source = open_source("lab/card")
    stated = {name: source.provenance.get(name) for name in ("license", "license_name", "license_link")}
    assert stated == {"license": "other", "license_name": "ours", "license_link": None}
    assert source.provenance["notes"][1:] == []
    (source.parents["source"] / "README.md").write_text("---\nlicense: mit\ntitle: a: b: c\n---\n")
    source = open_source("lab/card")
    assert "license" not in source.provenance
    assert "license is unknown: its README.md has no valid metadata" in source.provenance["notes"][0]
    (tmp_path / "card" / "model.safetensors").unlink()
    (tmp_path / "card" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../evil.safetensors"}}')
    upload(tmp_path / "card", "lab/index")
    with pytest.raises(ModelError, match=r"names '\.\./\.\./evil\.safetensors', which is not"):
        open_source("lab/index")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(ModelError, match="cannot be stored: .*No space left.*free space"):
        open_source("lab/card")


def test_what_the_hub_lacks_is_named(server: HubServer, tmp_path: Path) -> None:
    write_open_clip(tmp_path / "published", config_of({}))
    (tmp_path / "published" / "open_clip_model.safetensors").unlink()
    upload(tmp_path / "published", "lab/empty")
    with pytest.raises(ModelError, match=r"holds none of open_clip_model\.safetensors, open_clip_pytorch_model\.bin"):
        open_source("lab/empty")
    with pytest.raises(ModelError, match="revision v9"):
        open_source("lab/empty", revision="v9")
    with pytest.raises(ModelError, match="lab/nothing is neither on this machine"):
        open_source("lab/nothing")
