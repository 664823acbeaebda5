//! The weights of a model as XNNPACK packs them for this processor, in a file in memory: the first engine writes it, all map it.

// Maps of that file, and what the kernel is asked to do with them.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};
use std::os::fd::{IntoRawFd, OwnedFd, RawFd};
use std::sync::OnceLock;
use std::{io, ptr};

use rustix::fs::{MemfdFlags, fstat, ftruncate, memfd_create};
use rustix::io::{fcntl_dupfd_cloexec, pread, pwrite};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// Bytes of a huge page, where pages have 4 kB.
pub(super) const HUGE_PAGE: usize = 2 << 20;

/// The file. `None` where the kernel has no such files; then each engine has its own copy of the weights.
#[derive(Debug, Default)]
pub(super) struct Packed(OnceLock<Option<OwnedFd>>);

impl Packed {
    /// A descriptor of it for XNNPACK, which will close it.
    pub(super) fn descriptor(&self) -> Option<RawFd> {
        let make = || memfd_create("packed weights", MemfdFlags::CLOEXEC).ok();
        let packed = self.0.get_or_init(make).as_ref()?;
        // Not where standard input, output and error belong; 0 would mean that there is none.
        Some(fcntl_dupfd_cloexec(packed, 3).ok()?.into_raw_fd())
    }

    /// Moves what has been written into huge pages, as far as it fills them and the kernel has them. Whoever reads all of it once in a while then finds
    /// two entries of the page tables cold, not a thousand.
    pub(super) fn move_to_huge_pages(&self) {
        if let Some(Some(file)) = self.0.get()
            && let Err(error) = pad(file).and_then(|()| collapse(file))
        {
            tracing::debug!("the packed weights stay in small pages: {error}");
        }
    }

    #[cfg(test)]
    pub(super) fn file(&self) -> &OwnedFd {
        self.0.get().unwrap().as_ref().unwrap()
    }
}

/// Lengthens the file to whole huge pages, if it nearly fills them: only what a map covers to its end can be mapped as one. XNNPACK takes a file only if it
/// ends with the list of its buffers, so that grows too.
fn pad(file: &OwnedFd) -> io::Result<()> {
    let len = fstat(file)?.st_size.cast_unsigned();
    let huge = HUGE_PAGE as u64;
    let padded = len.next_multiple_of(huge);
    // Version, place and length of the list (`XNNPackCacheHeader` of TensorFlow Lite's weight_cache.h).
    let mut header = [[0; 8]; 3];
    pread(file, header.as_flattened_mut(), 0)?;
    let [version, list_at, list_len] = header.map(u64::from_ne_bytes);
    if padded - len > huge / 2 || version != 4 || list_at.checked_add(list_len) != Some(len) {
        return Ok(());
    }
    ftruncate(file, padded)?;
    pwrite(file, &(padded - list_at).to_ne_bytes(), 16)?;
    Ok(())
}

/// Has the kernel (Linux 6.1) move it, now.
fn collapse(file: &OwnedFd) -> io::Result<()> {
    /// Of `linux/mman.h`.
    const MADV_COLLAPSE: c_int = 25;
    unsafe extern "C" {
        fn madvise(at: *mut c_void, len: usize, advice: c_int) -> c_int;
    }
    let len = usize::try_from(fstat(file)?.st_size).map_err(io::Error::other)?;
    if len < HUGE_PAGE {
        return Ok(());
    }
    // SAFETY: a new map, at a place that the kernel chooses, in which nobody reads.
    let at = unsafe {
        mmap(
            ptr::null_mut(),
            len,
            ProtFlags::READ,
            MapFlags::SHARED,
            file,
            0,
        )
    }?;
    // SAFETY: that map; it changes no content.
    let moved = match unsafe { madvise(at, len, MADV_COLLAPSE) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    };
    // SAFETY: that map, which nobody else knows.
    unsafe { munmap(at, len) }?;
    moved
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_weights_that_nearly_fill_huge_pages_are_padded_to_them() {
        const KB: u64 = 1 << 10;
        for (version, listed, len, padded) in [
            (4, 1700 * KB, 1700 * KB, 2048 * KB),
            (4, 3804 * KB, 3804 * KB, 4096 * KB),
            // They would be mostly padding, or are not what is known.
            (4, 2100 * KB, 2100 * KB, 2100 * KB),
            (5, 1700 * KB, 1700 * KB, 1700 * KB),
            (4, 1600 * KB, 1700 * KB, 1700 * KB),
            (4, u64::MAX, 1700 * KB, 1700 * KB),
        ] {
            let file = memfd_create("packed weights", MemfdFlags::CLOEXEC).unwrap();
            ftruncate(&file, len).unwrap();
            let list_at = KB;
            let header = [version, list_at, listed.wrapping_sub(list_at)].map(u64::to_ne_bytes);
            pwrite(&file, header.as_flattened(), 0).unwrap();
            pad(&file).unwrap();
            let mut list_len = [0; 8];
            pread(&file, &mut list_len, 16).unwrap();
            let expected = if padded == len { listed } else { padded };
            let found = list_at.wrapping_add(u64::from_ne_bytes(list_len));
            assert_eq!(fstat(&file).unwrap().st_size.cast_unsigned(), padded);
            assert_eq!(found, expected);
            collapse(&file).ok();
            let mut after = [0; 8];
            pread(&file, &mut after, 16).unwrap();
            assert_eq!(after, list_len);
        }
        let empty = memfd_create("packed weights", MemfdFlags::CLOEXEC).unwrap();
        pad(&empty).unwrap();
        assert_eq!(fstat(&empty).unwrap().st_size, 0);
    }
}
