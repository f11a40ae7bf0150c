//! Splits a peer's bytes into lines. Bounded and pure: knows neither sockets nor JSON.

/// A buffer that grew beyond this for a long line is freed.
const KEEP_CAPACITY: usize = 1 << 10;

/// The received part of a line exceeds the limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LineTooLong;

/// Bytes that were read and not yet returned as lines.
#[derive(Debug)]
pub struct Lines {
    limit: usize,
    bytes: Vec<u8>,
    /// The offset of the next line in `bytes`, and where the search for its end continues.
    start: usize,
    searched: usize,
}

impl Lines {
    /// `limit` is the longest line, in bytes without its newline.
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            bytes: Vec::new(),
            start: 0,
            searched: 0,
        }
    }

    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Returns the buffered bytes: of complete lines, and of the incomplete one.
    pub fn held(&self) -> usize {
        self.bytes.len()
    }

    /// Returns the next complete line without its newline, if there is one.
    pub fn next_line(&mut self) -> Result<Option<Vec<u8>>, LineTooLong> {
        let newline = self.bytes[self.searched..].iter().position(|byte| *byte == b'\n');
        let end = newline.map_or(self.bytes.len(), |offset| self.searched + offset);
        if end - self.start > self.limit {
            return Err(LineTooLong);
        }
        self.searched = end;
        if newline.is_none() {
            return Ok(None);
        }
        let line = self.bytes[self.start..end].to_vec();
        self.start = end + 1;
        self.searched = self.start;
        Ok(Some(line))
    }

    /// Frees the memory of returned lines. Callers do so once per batch, because each call moves all bytes that
    /// follow.
    pub fn forget_taken(&mut self) {
        self.bytes.drain(..self.start);
        self.searched -= self.start;
        self.start = 0;
        if self.bytes.is_empty() && self.bytes.capacity() > KEEP_CAPACITY {
            self.bytes = Vec::new();
        }
    }
}
