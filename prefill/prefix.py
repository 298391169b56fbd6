"""What of a prompt is in pages already, and the ledger of this node's pages."""

from kernels.model.pages import PAGE_TOKENS, PagePool, PagesExhausted, page_hashes, pages_for
from prefill.request import PrefillRequest


class PrefixPages:
    """Leases pages for prompts: shared ones for a known prefix, fresh ones for the rest."""

    def __init__(self, pool: PagePool):
        self._pool = pool

    def begin(self, request: PrefillRequest) -> None:
        """Give a prompt its pages; raises PagesExhausted and leaves the ledger as it was.

        The last token is always computed anew, since its hidden state is where the first output comes from.
        """
        tokens_count = len(request.asked.token_ids)
        if request.page_hashes is None:
            request.page_hashes = page_hashes(request.asked.token_ids)
        known = self._pool.lease_cached(request.page_hashes[: (tokens_count - 1) // PAGE_TOKENS])
        try:
            fresh = self._pool.lease(pages_for(tokens_count) - len(known))
        except PagesExhausted:
            self._pool.release(known)
            raise
        request.pages = known + fresh
        request.cached_tokens_count = request.tokens_done_count = len(known) * PAGE_TOKENS

    def remember(self, request: PrefillRequest) -> None:
        """Let others find the full pages of a prompt that has been computed."""
        for page, digest in zip(request.pages, request.page_hashes or (), strict=False):
            self._pool.remember(page, digest)

    def end(self, request: PrefillRequest) -> None:
        """Give up a prompt's pages; those with a name stay cached."""
        self._pool.release(request.pages)
        request.pages = []
