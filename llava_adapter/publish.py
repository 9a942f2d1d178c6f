"""`publish-model DIR ORG/NAME`: an encoder folder, a LLaVA folder or the adapter inside one, to the Hub in one commit.

An encoder brings its card from export. A LLaVA's or adapter's card is written here unless its README.md was written by
hand; nothing in DIR is changed.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from encoders import manifest
from encoders.errors import UsageError, run_command
from encoders.manifest import Manifest
from encoders.publish import hub
from encoders.publish.publishable import ADAPTER, ADAPTER_CONFIG, CARD, read_seal, sha256


def cli() -> None:
    """Console entry point."""
    run_command(main)


def main() -> None:
    """Publish as told by the command line."""
    parser = argparse.ArgumentParser(
        prog="publish-model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="encoder folder, LLaVA folder, or LLAVA/adapter")
    parser.add_argument("repo", metavar="ORG/NAME", help="repository on the Hub; made if there is none, private")
    parser.add_argument("--public", action="store_true", help="a new repository is public; needed for a public one")
    parser.add_argument("--dry-run", action="store_true", help="check everything, list files and bytes, send nothing")
    parser.add_argument(
        "--create-pr", action="store_true", help="propose the commit as a pull request, a new one each time"
    )
    card = parser.add_argument_group("for the card of a LLaVA or an adapter")
    card.add_argument("--license", metavar="ID", help="the Hub's name of a licence: apache-2.0, llama3, ...")
    base = "published model it was made from (repeatable); of an adapter the one LLaVA it was trained on"
    card.add_argument("--base-model", action="append", default=[], metavar="ORG/NAME", help=base)
    results = "eval-mllm results of this model (repeatable); an adapter's are those of the LLaVA around it"
    card.add_argument("--results", type=Path, action="append", default=[], metavar="DIR", help=results)
    asked = parser.parse_args()
    instead = written_card(asked.folder, asked.repo, asked.license, asked.base_model, asked.results)
    hub.publish(
        asked.folder,
        asked.repo,
        public=asked.public,
        dry_run=asked.dry_run,
        create_pr=asked.create_pr,
        instead=instead,
    )


def written_card(
    folder: Path, repo: str, license: str | None, base_models: Sequence[str], results: Sequence[Path]
) -> Mapping[str, bytes]:
    """README.md (and of an adapter, adapter_config.json with its base) to publish in place of the folder's own.

    Raises UsageError where the options do not fit the artifact, DataError for results of another model.
    """
    seal = read_seal(folder)
    own_card = seal.kind == "encoder" or _written_by_hand(folder, seal)
    if own_card and (license or results or (base_models and seal.kind != ADAPTER)):
        raise UsageError(f"{folder / CARD} is published as it is; state licence, base models and results there")
    if seal.kind == "encoder":
        return {}
    if seal.kind == ADAPTER and len(base_models) != 1:
        raise UsageError("an adapter needs --base-model ORG/NAME: the published LLaVA (first stage) it was trained on")
    instead = _based_on(folder, base_models[0]) if seal.kind == ADAPTER else {}
    if own_card:
        return instead
    if license is None:
        raise UsageError(
            "a card needs --license (the language model's and the data's terms decide which one you may give)"
        )
    return instead | {CARD: _card(folder, repo, seal, license, base_models, results).encode()}


def _written_by_hand(folder: Path, seal: Manifest) -> bool:
    """PEFT writes an empty form beside an adapter, which the manifest knows; what it does not know, a person wrote."""
    file = folder / CARD
    return file.is_file() and (CARD not in seal.files or sha256(file) != seal.files[CARD].sha256)


def _based_on(adapter: Path, base_model: str) -> dict[str, bytes]:
    config = json.loads((adapter / ADAPTER_CONFIG).read_text())
    config["base_model_name_or_path"] = base_model
    return {ADAPTER_CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()}


def _card(
    folder: Path, repo: str, seal: Manifest, license: str, base_models: Sequence[str], results: Sequence[Path]
) -> str:
    from llava_adapter import card

    whole = manifest.read(folder.resolve().parent if seal.kind == ADAPTER else folder)
    scores = {name: bench for each in results for name, bench in card.read_results(each, whole).items()}
    if seal.kind == ADAPTER:
        return card.adapter_card(folder, repo, seal, license, base_models[0], scores)
    return card.llava_card(folder, repo, seal, license, base_models, scores)


if __name__ == "__main__":
    cli()
