"""PrefillClock: how long a prefill chunk may be, so that those who decode are not kept waiting."""

from __future__ import annotations

# While anything decodes, a step with a prefill chunk in it should take no longer than this.
STEP_SECONDS_BESIDE_DECODES = 0.050
MIN_PREFILL_CHUNK = 16


class PrefillClock:
    """How many prefill tokens fit in a step beside decodes, learned from finished steps.

    A step costs what its decodes cost (their weights are read anyway) plus a time per prefill
    token; both are moving averages, so the chunk shrinks as attention gets deeper."""

    def __init__(self, max_tokens: int, target_seconds: float = STEP_SECONDS_BESIDE_DECODES):
        self._max_tokens = max_tokens
        self._target = target_seconds
        self._decode_seconds = 0.0
        self._token_seconds = 0.0

    def observe(self, num_decodes: int, num_prefill_tokens: int, seconds: float) -> None:
        """One finished step."""
        if num_prefill_tokens == 0:
            if num_decodes:
                self._decode_seconds = self._blend(self._decode_seconds, seconds)
            return
        if num_prefill_tokens < MIN_PREFILL_CHUNK:
            return
        rest = seconds - (self._decode_seconds if num_decodes else 0.0)
        self._token_seconds = self._blend(self._token_seconds, max(rest, 0.0) / num_prefill_tokens)

    @property
    def chunk(self) -> int:
        """Tokens of prefill to schedule beside decodes."""
        if self._token_seconds <= 0.0:
            return min(4 * MIN_PREFILL_CHUNK, self._max_tokens)
        fits = int((self._target - self._decode_seconds) / self._token_seconds)
        return max(min(fits, self._max_tokens), min(MIN_PREFILL_CHUNK, self._max_tokens))

    @staticmethod
    def _blend(old: float, new: float) -> float:
        return new if old == 0.0 else 0.8 * old + 0.2 * new
