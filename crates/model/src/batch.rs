//! A packed row of documents as the model takes it.

use crate::{Error, Result};

/// One packed row of documents.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    /// Token ids, documents laid end to end.
    pub tokens_t: &'a [u32],
    /// The id that position t must predict (already shifted), or -1 for none. The last position of a document is always -1.
    pub targets_t: &'a [i32],
    /// Document borders: n_docs + 1 offsets, the first 0, the last T.
    pub cu_seqlens: &'a [u32],
}

impl Batch<'_> {
    pub(crate) fn check(&self) -> Result<()> {
        if self.targets_t.len() != self.tokens_t.len() {
            return Err(Error::Batch {
                what: format!(
                    "{} targets for {} tokens",
                    self.targets_t.len(),
                    self.tokens_t.len()
                ),
            });
        }
        check_borders(self.tokens_t, self.cu_seqlens)
    }
}

/// Whether the offsets rise from 0 to the number of tokens.
pub(crate) fn check_borders(tokens_t: &[u32], cu_seqlens: &[u32]) -> Result<()> {
    let ordered = cu_seqlens.windows(2).all(|pair| pair[0] < pair[1]);
    let spans = cu_seqlens.len() >= 2
        && cu_seqlens[0] == 0
        && cu_seqlens.last().copied() == u32::try_from(tokens_t.len()).ok();
    if ordered && spans {
        return Ok(());
    }
    Err(Error::Batch {
        what: format!(
            "cu_seqlens {cu_seqlens:?} do not rise from 0 to {} tokens",
            tokens_t.len()
        ),
    })
}
