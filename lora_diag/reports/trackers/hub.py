"""The model card of a model on the Hugging Face Hub, or in a local folder: a section with the report."""

from __future__ import annotations

import re
from pathlib import Path

from lora_diag.errors import InputError, UsageError
from lora_diag.files import CARD, check_output, write_whole
from lora_diag.rendering.html import read_card, with_section
from lora_diag.reports.trackers.payload import Payload


def send(payload: Payload, project: str | None) -> str:
    """Write the section into ``README.md`` of a folder, or commit it to a model on the Hub.

    Returns:
        The path of the card, or the address of the commit.

    Raises:
        UsageError: There is no project, or the card may not be written.
        InputError: The card cannot be read or written.
    """
    if project is None:
        raise UsageError("--to hub: give the model id or a folder with --project")
    section = re.sub(r"^(#+) ", r"#\1 ", payload.markdown, flags=re.MULTILINE)  # below the card's own title
    folder = Path(project)
    if folder.is_dir():
        card = folder / "README.md"
        check_output(card, CARD, overwrite=True)
        write_whole(card, with_section(read_card(card), "report", section), CARD, overwrite=True)
        return str(card)
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        try:
            old_card = read_card(Path(hf_hub_download(project, "README.md")))
        except EntryNotFoundError:
            old_card = ""
        commit = HfApi().upload_file(
            path_or_fileobj=with_section(old_card, "report", section).encode(),
            path_in_repo="README.md",
            repo_id=project,
            commit_message="Update the loradiag report",
        )
    except (HfHubHTTPError, ValueError, OSError) as error:
        raise InputError(f"{project}: its model card cannot be updated: {str(error).splitlines()[0]}") from error
    return str(commit)
