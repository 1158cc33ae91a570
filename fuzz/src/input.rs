//! How an input is taken apart.

/// An input: numbers from its front, zeros where it has ended.
#[derive(Debug)]
pub struct Input<'a> {
    rest: &'a [u8],
}

impl<'a> Input<'a> {
    /// All of it.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or_default()
    }

    /// The next two bytes.
    pub fn short(&mut self) -> u64 {
        u64::from(self.byte()) << 8 | u64::from(self.byte())
    }

    /// The next eight bytes.
    pub fn long(&mut self) -> u64 {
        (0..4).fold(0, |number, _| number << 16 | self.short())
    }

    /// The next bytes: fewer where it ends.
    pub fn take(&mut self, count: usize) -> &'a [u8] {
        let (head, tail) = self.rest.split_at(count.min(self.rest.len()));
        self.rest = tail;
        head
    }

    /// All that is left.
    pub fn rest(&mut self) -> &'a [u8] {
        self.take(usize::MAX)
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }
}

/// In which pieces bytes come.
#[derive(Clone, Copy, Debug)]
pub enum Cuts {
    /// All at once.
    Whole,
    /// In small pieces, whose lengths hang on the bytes: nothing but the input decides.
    Small,
}

impl Cuts {
    /// The bytes in these pieces, none of which is empty.
    pub fn of(self, bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
        let mut rest = bytes;
        std::iter::from_fn(move || {
            let (first, last) = (*rest.first()?, *rest.last()?);
            let length = match self {
                Self::Whole => rest.len(),
                Self::Small => 1 + usize::from((first ^ last) % 23),
            };
            let (head, tail) = rest.split_at(length.min(rest.len()));
            rest = tail;
            Some(head)
        })
    }
}
