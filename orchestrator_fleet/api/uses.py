"""When each key was used last, since it was last written down: noted at every request, so in memory alone."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator_fleet.orchestrators.keyring import Use


class Uses:
    """The newest use of each key. There are never more than keys, as only good ones are noted."""

    def __init__(self) -> None:
        self._new: dict[str, tuple[int, str | None]] = {}

    def note(self, key_id: str, *, address: str | None, now_us: int) -> None:
        """This key is used now."""
        self._new[key_id] = (now_us, address)

    def take(self) -> Mapping[str, Use]:
        """Everything that is not written down yet; whoever takes it has to, or give it back."""
        new, self._new = self._new, {}
        return {key_id: Use(at_us=at_us, address=address) for key_id, (at_us, address) in new.items()}

    def give_back(self, uses: Mapping[str, Use]) -> None:
        """It could not be written down; what is newer meanwhile counts."""
        self._new = {key_id: (use.at_us, use.address) for key_id, use in uses.items()} | self._new

    def newest(self, uses: Mapping[str, Use]) -> dict[str, Use]:
        """These, with what is not written down yet."""
        return {**uses, **{key_id: Use(at_us=at_us, address=where) for key_id, (at_us, where) in self._new.items()}}
