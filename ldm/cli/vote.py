"""`ldm vote page | count`: a person judges two evaluations blindly, and the votes are summed up."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from ldm.cli.chain import shown
from ldm.cli.console import heading, say
from ldm.cli.errors import UserError, user_mistakes
from ldm.cli.evaluation_report import open_folders
from ldm.cli.run_folder import write_json

if TYPE_CHECKING:
    from ldm.generation.report.votes import Verdict

PAGE, KEY, VERDICT = "vote.html", "vote_key.json", "verdict.json"


def page(config: DictConfig, overrides: Sequence[str]) -> None:
    """Writes the page to vote on, and the key that its votes are read with.

    Raises:
        UserError: there are no such evaluations, they share no prompt and seed, or the folder holds another page.
    """
    evaluations = open_folders(config.evaluations)
    if len(evaluations) != 2:
        raise UserError(f"evaluations: got {len(evaluations)}, expected two: evaluations=[A,B]")
    from ldm.generation.report import make_ballot

    with user_mistakes():
        ballot = make_ballot(*evaluations, num_pairs=config.num_pairs, seed=config.seed, question=str(config.question))
    out = Path(str(config.out)).expanduser()
    if (out / KEY).is_file() and json.loads((out / KEY).read_text())["page"] != ballot.key["page"]:
        raise UserError(f"out: got {out}, which holds another vote; name another folder, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    (out / PAGE).write_text(ballot.html, encoding="utf-8")
    write_json(out / KEY, ballot.key)
    heading(f"{len(ballot.key['flipped'])} pairs to vote on in {shown((out / PAGE).absolute())}")
    say(f"  hand out    {PAGE} alone: it opens in any browser, and its votes are downloaded as a file")
    say(f"  keep        {KEY}: it says which picture is whose")
    say(f"  then        ldm vote count votes=votes-*.json key={shown((out / KEY).absolute())}")


def count(config: DictConfig, overrides: Sequence[str]) -> None:
    """Sums up downloaded votes, writes verdict.json beside the key and prints it.

    Raises:
        UserError: there are no votes, or they are of another page.
    """
    files = vote_files(config.votes)
    path = Path(str(config.key)).expanduser()
    if path.suffix != ".json":
        path = path / KEY
    if not path.is_file():
        raise UserError(f"key: got {path}, which is no file; expected the {KEY} that `ldm vote page` wrote")
    from ldm.generation.report import count as count_votes
    from ldm.generation.report import read_votes

    with user_mistakes():
        key = json.loads(path.read_text())
        votes, num_repeated = read_votes(files, key)
        verdict = count_votes(
            votes,
            interval=config.interval,
            confidence=config.confidence,
            ties=config.ties,
            num_repeated=num_repeated,
        )
    out = Path(str(config.out)).expanduser() if config.out else path.with_name(VERDICT)
    settings = {"interval": config.interval, "confidence": config.confidence, "ties": config.ties}
    told = {"evaluations": key["evaluations"], "settings": settings}
    write_json(out, {**told, **vars(verdict), "preferred": verdict.preferred})
    report(verdict, [one["name"] for one in key["evaluations"]], confidence=config.confidence)
    say(f"  verdict       {shown(out.absolute())}")


def vote_files(value: Any) -> list[Path]:
    """The files that `votes=` names: a file, a folder of them, a pattern, or a list of these.

    Raises:
        UserError: there is none.
    """
    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    given = [Path(str(item)).expanduser() for item in (plain if isinstance(plain, list) else [plain] if plain else [])]
    found: list[Path] = []
    for path in given:
        matches = sorted(path.glob("votes-*.json")) if path.is_dir() else sorted(path.parent.glob(path.name))
        if not matches:
            raise UserError(f"votes: got {path}, where there are none; expected files that a vote page downloaded")
        found += matches
    if not found:
        raise UserError("votes: got none, expected files that a vote page downloaded: votes=votes-*.json")
    return list(dict.fromkeys(found))


def report(verdict: Verdict, names: Sequence[str], *, confidence: float) -> None:
    """Says who is preferred, how sure that is, and what speaks against it."""
    first, second = names
    preferred = verdict.preferred
    said = "undecided: the interval holds one half" if preferred is None else f"{names[preferred]} is preferred"
    heading(said)
    say(
        f"  {second} is preferred in {verdict.share:.1%} of {verdict.num_votes} votes; "
        f"{confidence:.0%} interval {verdict.low:.1%} to {verdict.high:.1%}"
    )
    say(f"  votes         {first}: {verdict.first}, {second}: {verdict.second}, no difference: {verdict.ties}")
    say(f"  voters        {verdict.num_sessions}; {verdict.seconds:.1f} s a vote (median)")
    if verdict.effective < verdict.num_votes:
        say(f"  prompts       {verdict.num_prompts}: as much evidence as {verdict.effective:.1f} independent votes")
    if verdict.num_repeated:
        say(f"  left out      {verdict.num_repeated} votes that the same person took back or repeated")
    if verdict.left is not None and verdict.first + verdict.second >= 20 and abs(verdict.left - 0.5) > 0.2:
        say(f"  note          {verdict.left:.0%} of the choices are the picture on the left", style="yellow")
