"""Composing and saving: the parts arrive unchanged, what disagrees is refused, a saved folder loads as it was."""

import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from chat_tokenizers import write_sentencepiece
from conftest import IMAGE_TOKENS, tiny_llama, write_encoder, write_llm
from hub_server import HubServer
from publishing import server as server
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import CLIPVisionModel, LlamaForCausalLM, LlavaForConditionalGeneration, LlavaProcessor

from encoders import manifest
from encoders.errors import DataError, ModelError, UsageError
from encoders.pretrained import load_strict
from llava_adapter.chat import TEMPLATES, ChatTemplate
from llava_adapter.compose import build, compose, describe, draft
from llava_adapter.geometry import geometry_of, image_token_count
from llava_adapter.save import load_llava, portable_state, save_llava
from llava_adapter.sources import fingerprint
from llava_adapter.tokenizer import prepare_tokenizer


def edit_config(folder: Path, file: str = "config.json", **changes: object) -> None:
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | changes))


def test_parts_arrive_unchanged(tiny_encoder: Path, tiny_llm: Path) -> None:
    """The projector is fed hidden_states[-2] without class token; text-only logits are the LLM's own."""
    model, processor = compose(tiny_encoder, tiny_llm, "llama3", torch.float32)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(20)[None] + 100
    fed = []
    model.model.multi_modal_projector.register_forward_pre_hook(lambda _, inputs: fed.append(inputs[0]))
    with torch.no_grad():
        model.get_image_features(pixels)
        states = CLIPVisionModel.from_pretrained(tiny_encoder)(pixels, output_hidden_states=True).hidden_states
        assert torch.equal(fed[0], states[-2][:, 1:])
        assert torch.equal(model(ids).logits, LlamaForCausalLM.from_pretrained(tiny_llm)(ids).logits)
    assert model.config.text_config.vocab_size == 409, "a spare token served as image token: no resize"
    assert f"takes {IMAGE_TOKENS} tokens" in describe(model.config, processor)


@pytest.mark.parametrize("tied", [False, True])
def test_vocabulary_without_spare_tokens_grows_to_64(tied: bool, tiny_encoder: Path, tmp_path: Path) -> None:
    llm = write_llm(tmp_path / "llm", tie_word_embeddings=tied)
    text = (llm / "tokenizer.json").read_text()
    text = text.replace("reserved_special_token_", "taken_").replace("finetune_right_pad_id", "taken_pad")
    (llm / "tokenizer.json").write_text(text)
    model, processor = compose(tiny_encoder, llm, "llama3", torch.float32)
    assert model.config.text_config.vocab_size == 448
    assert model.get_input_embeddings().weight.shape[0] == model.lm_head.weight.shape[0] == 448
    assert processor.tokenizer.pad_token == "<pad>"
    save_llava(model, processor, tmp_path / "llava")
    loaded, _ = load_llava(tmp_path / "llava", torch.float32)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_perturbed_tower_survives_saving(tiny_llava: Path, tmp_path: Path) -> None:
    """What is saved is the tower in memory, not the one it came from; names are those of both transformers majors."""
    model, processor = load_llava(tiny_llava, torch.float32)
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model.get_image_features(pixels).pooler_output[0]
        for parameter in model.model.vision_tower.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        wanted = model.get_image_features(pixels).pooler_output[0]
        save_llava(model, processor, tmp_path / "llava")
        loaded, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava", output_loading_info=True)
        got = loaded.get_image_features(pixels).pooler_output[0]
    assert not any(info.values())
    assert torch.equal(got, wanted)
    assert not torch.equal(got, before)


def test_portable_layout(tiny_llava: Path) -> None:
    """The names and settings that transformers 4.57 reads."""
    names = set(load_file(tiny_llava / "model.safetensors"))
    assert "vision_tower.vision_model.embeddings.class_embedding" in names
    assert {"language_model.model.embed_tokens.weight", "language_model.lm_head.weight"} <= names
    prefixes = ("vision_tower.vision_model.", "multi_modal_projector.", "language_model.")
    assert all(name.startswith(prefixes) for name in names)
    config = json.loads((tiny_llava / "config.json").read_text())
    assert config["text_config"]["rope_theta"] == 500000.0
    assert config["vision_config"]["hidden_act"] == "gelu"
    assert "_name_or_path" not in json.dumps(config)
    tokenizer = json.loads((tiny_llava / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["extra_special_tokens"] == {"image_token": "<image>"}
    assert json.loads((tiny_llava / "preprocessor_config.json").read_text())["image_mean"] == [0.4, 0.5, 0.6]


def test_scaled_rope_keeps_its_scaling(tiny_encoder: Path, tmp_path: Path) -> None:
    """LLaMA-3.1 and 3.2 scale their RoPE: 4.57 finds it under rope_scaling, 5 under rope_parameters. 3.2 is tied."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 64
    llm = write_llm(tmp_path / "llm", tie_word_embeddings=True)
    edit_config(llm, rope_parameters=scaling | {"rope_theta": 500000.0})
    model, processor = compose(tiny_encoder, llm, "llama3", torch.float32)
    save_llava(model, processor, tmp_path / "llava")
    text = json.loads((tmp_path / "llava" / "config.json").read_text())["text_config"]
    assert text["rope_scaling"] == scaling
    loaded, _ = load_llava(tmp_path / "llava", torch.float32)
    ids = torch.arange(90)[None] + 100
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert "tied" in describe(model.config, processor)


def test_one_bos_on_every_path(tiny_llava: Path) -> None:
    processor = LlavaProcessor.from_pretrained(tiny_llava)
    tokenizer = processor.tokenizer
    messages = [{"role": "user", "content": "What?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    paths = [
        tokenizer(text)["input_ids"],
        processor(text=text)["input_ids"][0],
        tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ],
        processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ][0],
    ]
    assert all(list(ids) == list(paths[0]) for ids in paths)
    assert list(paths[0]).count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token == "<|eot_id|>"
    assert (
        tokenizer.pad_token_id
        not in LlavaForConditionalGeneration.from_pretrained(tiny_llava).generation_config.eos_token_id
    )


@pytest.mark.parametrize(("image_size", "tokens"), [(24, 9), (32, 16), (48, 36)])
def test_image_token_count(image_size: int, tokens: int, tiny_llm: Path, tmp_path: Path) -> None:
    """The count follows from the encoder's config, equals the stock processor's and is what the model takes."""
    model, processor = compose(write_encoder(tmp_path / "encoder", image_size), tiny_llm, "llama3", torch.float32)
    assert image_token_count(processor) == model.config.image_seq_length == tokens
    assert processor._get_num_multimodal_tokens(image_sizes=[[70, 50]])["num_image_tokens"] == [tokens]
    ids = torch.full((1, tokens), model.config.image_token_id)
    assert model(ids, pixel_values=torch.randn(1, 3, image_size, image_size)).logits.shape[1] == tokens


def test_generation_stops_at_the_end_token(tiny_llava: Path) -> None:
    """With the tokenizer's EOS alone (as lmms-eval asks) and with the generation config."""
    model, processor = load_llava(tiny_llava, torch.float32)
    end = processor.tokenizer.eos_token_id
    ids = torch.tensor([[processor.tokenizer.bos_token_id, 300]])
    with torch.no_grad():
        model.lm_head.weight.zero_()
        state = model.model(ids).last_hidden_state[0, -1]
        model.lm_head.weight[end] = state
    for settings in ({}, {"eos_token_id": end}):
        out = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, **settings)
        assert out[0, 2:].tolist() == [end]


def test_tower_whose_config_and_weights_disagree(tiny_encoder: Path, tiny_llm: Path, tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    shutil.copytree(tiny_encoder, folder)
    edit_config(folder, image_size=48)
    with pytest.raises(ModelError, match=r"position_embedding.*saved as \[17, 32\], config asks \[37, 32\]"):
        compose(folder, tiny_llm, "llama3", torch.float32)
    edit_config(folder, image_size=32)
    edit_config(folder, "preprocessor_config.json", crop_size={"height": 48, "width": 48})
    with pytest.raises(ModelError, match="cropped to 48x48"):
        compose(folder, tiny_llm, "llama3", torch.float32)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match="mean, std and size are unknown"):
        compose(folder, tiny_llm, "llama3", torch.float32)


def test_wrong_keys_are_named(tiny_encoder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    shutil.copytree(tiny_encoder, folder)
    state = load_file(folder / "model.safetensors")
    state["vision_model.stray.weight"] = state.pop("vision_model.pre_layrnorm.weight")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 missing \(.*pre_layrnorm.weight\), 1 unexpected \(.*stray.weight\)"):
        load_strict(CLIPVisionModel, folder, torch.float32)


def test_folders_of_the_wrong_kind(tiny_encoder: Path, tiny_llm: Path, tmp_path: Path) -> None:
    siglip = tmp_path / "siglip"
    shutil.copytree(tiny_encoder, siglip)
    edit_config(siglip, model_type="siglip_vision_model")
    with pytest.raises(ModelError, match="'siglip_vision_model', needed is 'clip_vision_model'"):
        compose(siglip, tiny_llm, "llama3", torch.float32)
    with pytest.raises(ModelError, match="needed is 'clip_vision_model'"):
        compose(tiny_llm, tiny_llm, "llama3", torch.float32)
    with pytest.raises(ModelError, match="no config.json"):
        compose(tmp_path, tiny_llm, "llama3", torch.float32)
    llm = tmp_path / "llm"
    shutil.copytree(tiny_llm, llm)
    (llm / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="no tokenizer.json"):
        compose(tiny_encoder, llm, "llama3", torch.float32)
    with pytest.raises(ModelError, match="lacks <|im_start|>"):
        compose(tiny_encoder, tiny_llm, "chatml", torch.float32)
    for template in ("plain", "vicuna"):
        with pytest.raises(UsageError, match="choose one of: llama3, vicuna_v1, chatml"):
            compose(tiny_encoder, tiny_llm, template, torch.float32)


def test_spare_token_is_renamed_in_place(tmp_path: Path) -> None:
    """Its id stays, also where the base vocabulary lists it as well (SmolLM2)."""
    llm = write_llm(tmp_path / "llm")
    before = Tokenizer.from_file(str(llm / "tokenizer.json"))
    llama3 = TEMPLATES["llama3"]
    assert isinstance(llama3, ChatTemplate)
    tokenizer = prepare_tokenizer(llm, llama3)
    assert tokenizer.image_token_id == before.token_to_id("<|reserved_special_token_0|>")
    assert len(tokenizer) == before.get_vocab_size()
    assert tokenizer.tokenize("a<image>b")[1] == "<image>"


def test_a_model_with_an_adapter_is_not_saved_as_plain(tiny_llava: Path) -> None:
    from llava_adapter.tuning import STAGES, apply

    model, _ = load_llava(tiny_llava, torch.float32)
    apply(model, STAGES["lora"])
    with pytest.raises(ModelError, match="merge the adapter"):
        portable_state(model)


def test_the_plan_is_told_before_any_weight_is_read(tiny_encoder: Path, tiny_llm: Path, tmp_path: Path) -> None:
    """From the small files alone, and just what the loaded model then is."""
    for name, folder in (("encoder", tiny_encoder), ("llm", tiny_llm)):
        shutil.copytree(folder, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors"))
    plan = draft(tmp_path / "encoder", tmp_path / "llm", "llama3", "pad", torch.float32)
    assert not any(tmp_path.rglob("*.safetensors"))
    told = str(plan)
    assert "32 x 32 pixels, padded to a square with the mean colour, resized (bicubic), patch 8: 4 x 4 patches" in told
    assert "mean 0.4 0.5 0.6, std 0.2 0.25 0.3" in told
    assert "image <image> = 402, end <|eot_id|> = 408, pad <|finetune_right_pad_id|> = 404" in told
    with pytest.raises(ModelError, match="holds no model.safetensors"):
        build(plan)
    model, processor = compose(tiny_encoder, tiny_llm, "llama3", torch.float32, "pad")
    assert describe(model.config, processor) == told
    sizes = {"tower": model.model.vision_tower, "LLM": model.model.language_model}
    for name, part in sizes.items():
        assert f"{name} {sum(p.numel() for p in part.parameters()):,}" in told


def test_models_from_the_hub(server: HubServer, tiny_encoder: Path, tiny_llm: Path) -> None:
    """An id works where a folder does; drafting fetches no weights, and a gated or missing model is told as such."""
    client = huggingface_hub.HfApi()
    for repo, folder in (("someone/encoder", tiny_encoder), ("someone/llm", tiny_llm)):
        client.create_repo(repo)
        client.upload_folder(repo_id=repo, folder_path=folder)
    plan = draft("someone/encoder", "someone/llm", "llama3", "crop", torch.float32)
    assert server.count("GET", "resolve/.*safetensors$") == 0
    assert str(plan) == str(draft(tiny_encoder, tiny_llm, "llama3", "crop", torch.float32))
    torch.manual_seed(0)
    fetched = build(plan).state_dict()
    assert server.count("GET", "resolve/.*safetensors$") == 2
    torch.manual_seed(0)
    local = compose(tiny_encoder, tiny_llm, "llama3", torch.float32)[0].state_dict()
    assert all(torch.equal(fetched[name], local[name]) for name in local)
    with pytest.raises(ModelError, match="(?s)someone/none is neither on this machine nor to be had.*hf auth login"):
        draft("someone/encoder", "someone/none", "llama3", "crop", torch.float32)
    with pytest.raises(UsageError, match="no folder, and no id"):
        draft(tiny_encoder, "/nowhere/at all", "llama3", "crop", torch.float32)


def test_a_trained_projector_fits_only_what_it_was_trained_between(
    tiny_encoder: Path, tiny_llm: Path, tmp_path: Path
) -> None:
    model, processor = compose(tiny_encoder, tiny_llm, "llama3", torch.float32)
    trained = {name: tensor.clone() for name, tensor in model.model.multi_modal_projector.state_dict().items()}
    save_llava(model, processor, tmp_path / "llava")
    folders = {"encoder": tiny_encoder, "llm": tiny_llm}
    origin = {role: {"fingerprint": fingerprint(folder)} for role, folder in folders.items()}
    manifest.seal(tmp_path / "llava", "llava", origin)
    plan = draft(tiny_encoder, tiny_llm, "llama3", "crop", torch.float32)
    taken = build(plan, tmp_path / "llava").model.multi_modal_projector.state_dict()
    assert all(torch.equal(taken[name], trained[name]) for name in trained)
    assert not all(torch.equal(fresh, trained[name]) for name, fresh in _projector(build(plan)).items())

    other = draft(write_encoder(tmp_path / "other", seed=1), tiny_llm, "llama3", "crop", torch.float32)
    with pytest.raises(ModelError, match=r"trained on another encoder \(sha256 [0-9a-f]{12}\)"):
        build(other, tmp_path / "llava")
    other = draft(tiny_encoder, write_llm(tmp_path / "llm", seed=1), "llama3", "crop", torch.float32)
    with pytest.raises(ModelError, match="trained on another llm"):
        build(other, tmp_path / "llava")
    (tmp_path / "no_llava").mkdir()
    manifest.seal(tmp_path / "no_llava", "encoder", {})
    with pytest.raises(DataError, match="holds a 'encoder' artifact where 'llava' is needed"):
        build(plan, tmp_path / "no_llava")
    # The manifest may still name the encoder when the tower has been trained on since.
    with torch.no_grad():
        next(model.model.vision_tower.parameters()).add_(0.1)
    save_llava(model, processor, tmp_path / "moved")
    manifest.seal(tmp_path / "moved", "llava", origin)
    with pytest.raises(ModelError, match=r"differs from .* in 1 tensors.*its tower was trained too"):
        build(plan, tmp_path / "moved")


def test_a_model_is_known_by_its_content_wherever_it_lies(tiny_llm: Path, tmp_path: Path) -> None:
    """Two machines fetch at different times; weights of equal size and time are not equal for that."""
    known, copy = fingerprint(tiny_llm), shutil.copytree(tiny_llm, tmp_path / "copy")
    weights = copy / "model.safetensors"
    os.utime(weights, ns=(0, 0))
    (copy / "README.md").write_text("fetched with the card")
    assert fingerprint(copy) == known
    state = load_file(weights)
    state["model.norm.weight"] += 1
    save_file(state, weights, metadata={"format": "pt"})
    os.utime(weights, ns=(0, 0))
    assert fingerprint(copy) != known


def _projector(model: LlavaForConditionalGeneration) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = model.model.multi_modal_projector.state_dict()
    return state


def test_vicuna_grows_and_says_the_same_after_reload(tiny_encoder: Path, tmp_path: Path) -> None:
    """A SentencePiece tokenizer has no spare token, and puts a space before every text until it is told not to."""
    llm = write_sentencepiece(tmp_path / "llm")
    LlamaForCausalLM(tiny_llama(vocab_size=500)).save_pretrained(llm)
    model, processor = compose(tiny_encoder, llm, "vicuna_v1", torch.float32)
    tokenizer = processor.tokenizer
    assert model.config.text_config.vocab_size == 512
    assert (tokenizer.image_token_id, tokenizer.pad_token_id) == (500, 501)
    assert model.generation_config.eos_token_id == [tokenizer.convert_tokens_to_ids("</s>")]
    save_llava(model, processor, tmp_path / "llava")
    loaded = load_llava(tmp_path / "llava", torch.float32)[1].tokenizer
    text = "<s> a dog <image>\nWhat? ASSISTANT: left</s>USER: é😀"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.tokenize(text)[:2] == ["<s>", "▁a"]
    (llm / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.model is the older form.*save_pretrained.*sentencepiece<0\.2\.2"):
        compose(tiny_encoder, llm, "vicuna_v1", torch.float32)


def test_a_tokenizer_of_another_model(tiny_encoder: Path, tiny_llm: Path, tmp_path: Path) -> None:
    llm = tmp_path / "llm"
    shutil.copytree(tiny_llm, llm)
    edit_config(llm, vocab_size=300)
    with pytest.raises(ModelError, match="tokenizer.json has 409 tokens but config.json vocab_size 300"):
        compose(tiny_encoder, llm, "llama3", torch.float32)
    with pytest.raises(ModelError, match="lacks <s>, </s>"):
        compose(tiny_encoder, tiny_llm, "vicuna_v1", torch.float32)
    (llm / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="is not a tokenizer"):
        compose(tiny_encoder, llm, "llama3", torch.float32)


def test_a_squashing_encoder_is_cropped_or_padded_as_asked(tiny_encoder: Path, tiny_llm: Path, tmp_path: Path) -> None:
    """CLIPS' released weights squash at test time; a LLaVA's geometry is its recipe's."""
    folder = tmp_path / "encoder"
    shutil.copytree(tiny_encoder, folder)
    edit_config(folder, "preprocessor_config.json", size={"height": 32, "width": 32}, resample=2)
    for geometry, kind in (("crop", "CLIPImageProcessor"), ("pad", "LlavaImageProcessor")):
        images = compose(folder, tiny_llm, "llama3", torch.float32, geometry)[1].image_processor
        assert (type(images).__name__, int(images.resample), images.size) == (kind, 2, {"shortest_edge": 32})
        assert geometry_of(images) == geometry
