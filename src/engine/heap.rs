//! What an engine leaves in the heap.

// Not a call into a runtime.
#![allow(unsafe_code)]

/// Dropped after an engine: its memory goes back to the system. It lies among other blocks, where glibc would keep it.
pub(super) struct GivenBack;

impl Drop for GivenBack {
    fn drop(&mut self) {
        #[cfg(target_env = "gnu")]
        {
            unsafe extern "C" {
                fn malloc_trim(keep: usize) -> std::ffi::c_int;
            }
            // SAFETY: a function of glibc that takes any number, and that any thread may call.
            unsafe { malloc_trim(0) };
        }
    }
}
