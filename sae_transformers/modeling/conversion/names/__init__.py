"""Published SAEs by name: our short names and SAELens' registry."""

from __future__ import annotations

from typing import Any, NamedTuple

from .releases import find_sae, releases
from .saelens import PREFIX, find_registered, saelens_releases, search_registered, version

SHOWN = 40


class Named(NamedTuple):
    """What a name means.

    Attributes:
        place: Hub id, with the path inside it.
        given: what it says about the SAE, for `conversion.convert`: `base_model`, the `format` of its files,
            `known_as` (`sae_lens`, `neuronpedia_id`) and fields of its config.
    """

    place: str
    given: dict[str, Any]


def find_named(name: str) -> Named | None:
    """The SAE that a name means; None where its first part is no release of ours and none of SAELens'.

    Raises:
        ValueError: the release has no such SAE, or it is one that is not read; says why.
    """
    if not name.startswith(PREFIX):
        try:
            ours = find_sae(name)
        except ValueError:  # several releases have one name in both lists, and other ids
            if _registered_or_none(name) is None:
                raise
        else:
            if ours is not None:
                return Named(f"{ours.repository}/{ours.sae_id}".rstrip("/"), {"base_model": ours.base})
    found = find_registered(name)
    if found is None:
        return None
    if found.format is None:
        raise ValueError(f"{found.name} is not read: {found.refusal}. Received: {name!r}.")
    known_as = {"sae_lens": f"{found.release}/{found.sae_id}"}
    if found.neuronpedia:
        known_as["neuronpedia_id"] = found.neuronpedia
    given = {"base_model": found.base, "format": found.format, "known_as": known_as}
    if found.normalize:
        given["normalize_activations"] = found.normalize
    return Named(f"{found.repository}/{found.path}", given)


def listing(queries: list[str]) -> list[str]:
    """Lines for people: the releases of ours whose name holds one of the queries, and the SAEs of SAELens' registry
    that a query finds; all of ours where nothing is asked."""
    chosen = [one for name, one in releases().items() if not queries or any(query in name for query in queries)]
    lines = []
    for release in chosen:
        facts = filter(None, (f"{release.base}, {release.licence}", release.summary()))
        lines += [release.pattern, *(f"    {fact}" for fact in facts)]
    lines.append(f"{len(chosen)} releases" if chosen else "No release of such a name.")
    if not queries:
        count = len(saelens_releases())
        return [*lines, f"SAELens' names are taken too ({count} releases of {version()}): --sae WORDS searches them."]
    found = [sae for query in queries for sae in search_registered(query)]
    for sae in found[:SHOWN]:
        lines.append(f"{sae.name}  {sae.base}, {sae.format or f'not read: {sae.refusal}'}")
    more = f", {len(found) - SHOWN} of them not shown: add words" if len(found) > SHOWN else ""
    return [*lines, f"{len(found)} SAEs of SAELens' registry ({version()}){more}"]


def _registered_or_none(name: str) -> object:
    try:
        return find_registered(name)
    except ValueError:
        return None


__all__ = ["Named", "find_named", "listing"]
