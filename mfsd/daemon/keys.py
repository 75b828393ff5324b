# SPDX-License-Identifier: Apache-2.0
"""The classifier's keys as the engine uses them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mfsd.datapath.bpf.keys import cookie_key, tuple_key

if TYPE_CHECKING:
    from mfsd.datapath.bpf.loader import Classifier
    from mfsd.ground.model import Endpoints


class KernelKeys:
    """engine.slots.KeyMap on the classifier's hash maps, which all devices share."""

    def __init__(self, classifier: Classifier) -> None:
        self._cookies, self._tuples = classifier.cookies, classifier.tuples

    def slot_of(self, cookie: int) -> int | None:
        """See engine.slots.KeyMap."""
        return self._cookies.get(cookie_key(cookie))

    def add_cookie(self, cookie: int, slot: int) -> None:
        """See engine.slots.KeyMap."""
        self._cookies.add(cookie_key(cookie), slot)

    def delete_cookie(self, cookie: int) -> None:
        """See engine.slots.KeyMap."""
        self._cookies.delete(cookie_key(cookie))

    def add_tuple(self, endpoints: Endpoints, slot: int) -> None:
        """See engine.slots.KeyMap."""
        self._tuples.add(tuple_key(endpoints), slot)

    def delete_tuple(self, endpoints: Endpoints) -> None:
        """See engine.slots.KeyMap."""
        self._tuples.delete(tuple_key(endpoints))
