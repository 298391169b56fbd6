"""What of a prompt is in pages already, and the ledger of this node's pages."""

from kernels.model.pages import PAGE_TOKENS, PagePool, page_hashes, pages_for
from prefill.request import PrefillRequest


class PrefixPages:
    """Leases pages for prompts: shared ones for a known prefix, fresh ones for the rest."""

    def __init__(self, pool: PagePool):
        self._pool = pool

    def fits(self, tokens_count: int) -> bool:
        """Whether a prompt of this length could ever be taken."""
        return pages_for(tokens_count) <= self._pool.pages_count

    def begin(self, request: PrefillRequest) -> None:
        """Give a prompt its pages; raises PagesExhausted and leaves the ledger as it was.

        The last token is always computed anew, since its hidden state is where the first output comes from.
        """
        token_ids = request.asked.token_ids
        hashes = page_hashes(token_ids)[: (len(token_ids) - 1) // PAGE_TOKENS]
        known = self._pool.lease_cached(hashes)
        try:
            fresh = self._pool.lease(pages_for(len(token_ids)) - len(known))
        except Exception:
            self._pool.release(known)
            raise
        request.pages = known + fresh
        request.cached_tokens_count = request.tokens_done_count = len(known) * PAGE_TOKENS

    def remember(self, request: PrefillRequest) -> None:
        """Let others find the full pages of a prompt that has been computed."""
        for page, digest in zip(request.pages, page_hashes(request.asked.token_ids), strict=False):
            self._pool.remember(page, digest)

    def end(self, request: PrefillRequest) -> None:
        """Give up a prompt's pages; those with a name stay cached."""
        self._pool.release(request.pages)
        request.pages = []
