//! Nodes by number instead of by reference, so that they can name each other.

/// Nodes by number. Their addresses never change, and growing never copies them.
pub(super) struct Pool<T> {
    chunks: Vec<Vec<T>>,
    free: Vec<u32>,
}

impl<T> Pool<T> {
    /// Nodes per chunk; a power of two, so that a number splits into chunk and place by shifts.
    const CHUNK: usize = 32;

    pub(super) const fn new() -> Pool<T> {
        Pool { chunks: Vec::new(), free: Vec::new() }
    }

    #[inline]
    pub(super) fn at(&self, id: u32) -> &T {
        &self.chunks[id as usize / Self::CHUNK][id as usize % Self::CHUNK]
    }

    #[inline]
    pub(super) fn at_mut(&mut self, id: u32) -> &mut T {
        &mut self.chunks[id as usize / Self::CHUNK][id as usize % Self::CHUNK]
    }

    pub(super) fn add(&mut self, node: T) -> u32 {
        if let Some(id) = self.free.pop() {
            *self.at_mut(id) = node;
            return id;
        }
        if self.chunks.last().is_none_or(|chunk| chunk.len() == Self::CHUNK) {
            self.chunks.push(Vec::with_capacity(Self::CHUNK));
        }
        let full = (self.chunks.len() - 1) * Self::CHUNK;
        let chunk = self.chunks.last_mut().expect("a chunk was just put there");
        chunk.push(node);
        u32::try_from(full + chunk.len() - 1).expect("2^32 nodes of hundreds of bytes do not fit into memory")
    }

    /// Returns node `id` and leaves `vacant` in its place until another needs it.
    pub(super) fn take(&mut self, id: u32, vacant: T) -> T {
        self.free.push(id);
        std::mem::replace(self.at_mut(id), vacant)
    }

    /// Forgets all nodes but keeps the room of the first few.
    pub(super) fn clear(&mut self) {
        self.chunks.truncate(1);
        self.chunks.iter_mut().for_each(Vec::clear);
        self.free = Vec::new();
    }

    pub(super) fn used(&self) -> usize {
        self.chunks.iter().map(Vec::len).sum::<usize>() - self.free.len()
    }

    pub(super) fn heap_bytes(&self) -> usize {
        self.chunks.len() * Self::CHUNK * size_of::<T>()
            + self.chunks.capacity() * size_of::<Vec<T>>()
            + self.free.capacity() * size_of::<u32>()
    }
}
