//! What an engine leaves in the heap, when it goes and when a worker's own has been loaded.

// Not a call into a runtime.
#![allow(unsafe_code)]

/// Gives free memory of the heap back to the system, also where it lies among other blocks, where glibc would keep it.
pub(super) fn give_back() {
    #[cfg(target_env = "gnu")]
    {
        unsafe extern "C" {
            fn malloc_trim(keep: usize) -> std::ffi::c_int;
        }
        // SAFETY: a function of glibc that takes any number, and that any thread may call.
        unsafe { malloc_trim(0) };
    }
}

/// Dropped after an engine.
pub(super) struct GivenBack;

impl Drop for GivenBack {
    fn drop(&mut self) {
        give_back();
    }
}
