//! How an evaluation says how far it is.

/// Hears of it.
pub trait Progress {
    /// Something of so many parts begins.
    fn begin(&mut self, what: &str, total: u64);
    /// So many parts of it are done; `of` says more, or is empty.
    fn advance(&mut self, done: u64, of: &str);
    /// It is done.
    fn end(&mut self);
}
