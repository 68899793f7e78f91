//! Cipher keys that leave nothing in memory: ring does not erase its own.

use std::mem::{MaybeUninit, size_of};
use std::ptr::write_volatile;

/// A key at one place in memory, which is overwritten when it is dropped.
pub(super) struct Erased<T>(Box<MaybeUninit<T>>);

impl<T> Erased<T> {
    pub(super) fn new(key: T) -> Self {
        Self(Box::new(MaybeUninit::new(key)))
    }

    pub(super) fn get(&self) -> &T {
        // SAFETY: it is initialised from `new` until `drop`.
        unsafe { self.0.assume_init_ref() }
    }
}

impl<T> Drop for Erased<T> {
    fn drop(&mut self) {
        // SAFETY: it is initialised, and nobody uses it after this.
        unsafe { self.0.assume_init_drop() };
        let bytes = self.0.as_mut_ptr().cast::<u8>();
        for at in 0..size_of::<T>() {
            // SAFETY: `at` is inside the box, of which any byte pattern is a value by now.
            unsafe { write_volatile(bytes.add(at), 0) };
        }
    }
}
