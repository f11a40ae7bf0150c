//! Bytes to lines: whatever a peer says, cut at its newlines. Bounded, and pure: knows no socket and no JSON.

/// A buffer that grew beyond this for one long line is given back.
const KEEP_CAPACITY: usize = 1 << 10;

/// A line is longer than it may be, as far as it came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LineTooLong;

/// What was read and is no line yet.
#[derive(Debug)]
pub struct Lines {
    limit: usize,
    bytes: Vec<u8>,
    /// Where in `bytes` the next line begins, and how far it was searched for its end already.
    start: usize,
    searched: usize,
}

impl Lines {
    /// `limit` bounds a line, in bytes without its newline.
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

    /// Bytes that are held: of lines that are there, and of the one that is not whole yet.
    pub fn held(&self) -> usize {
        self.bytes.len()
    }

    /// The next whole line without its newline, if one is there.
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

    /// Gives back the memory of lines that were taken. For once in a while, not for once a line: many short lines would
    /// each move all that follows them.
    pub fn forget_taken(&mut self) {
        self.bytes.drain(..self.start);
        self.searched -= self.start;
        self.start = 0;
        if self.bytes.is_empty() && self.bytes.capacity() > KEEP_CAPACITY {
            self.bytes = Vec::new();
        }
    }
}
