//! Reading one file of the export folder, within limits, without following it out of the folder and without hanging on it.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{ErrorKind, Read as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::Path;

use crate::prediction::{RejectCode, RejectReason};
use crate::scan::Stamp;

/// What reading gave.
#[derive(Debug)]
pub enum Content {
    /// The whole file, which did not change while it was read.
    Bytes(Vec<u8>, Stamp),
    /// It is not there.
    Vanished,
    /// It changed while it was read.
    Changing,
    /// The file system or the process is in trouble, not the file: another try will tell.
    Trouble(Option<Stamp>),
    /// It cannot be used, whatever it holds.
    Rejected(RejectReason, Stamp),
}

/// Reads `relative` below `root` (a canonical path), at most `limit` bytes.
pub fn read(root: &Path, relative: &Path, limit: u64) -> Content {
    let path = root.join(relative);
    let link = match path.symlink_metadata() {
        Ok(metadata) => metadata,
        Err(error) if gone(&error) => return Content::Vanished,
        Err(_) => return Content::Trouble(None),
    };
    let stamp = Stamp::of(&link);
    let metadata = if link.is_symlink() {
        match path.metadata() {
            Ok(metadata) => metadata,
            Err(error) => return unreadable(&error, stamp),
        }
    } else {
        link
    };
    let stamp = Stamp::of(&metadata);
    // Looked at before it is opened: opening a device may do something.
    if !metadata.is_file() {
        return Content::Rejected(
            RejectReason::new(RejectCode::NotAFile, not_a_file(&metadata)),
            stamp,
        );
    }
    let mut file = match OpenOptions::new()
        .read(true)
        .custom_flags(rustix::fs::OFlags::NONBLOCK.bits().cast_signed())
        .open(&path)
    {
        Ok(file) => file,
        Err(error) if gone(&error) => return Content::Vanished,
        Err(error) => return unreadable(&error, stamp),
    };
    if !inside(root, &path, &file) {
        return Content::Rejected(
            RejectReason::new(
                RejectCode::OutsideFolder,
                "a link leads out of the export folder",
            ),
            stamp,
        );
    }
    match file.metadata() {
        Ok(now) if now.is_file() && Stamp::of(&now) == stamp => {}
        Ok(_) => return Content::Changing,
        Err(error) => return unreadable(&error, stamp),
    }
    if stamp.size > limit {
        let message = format!(
            "{} bytes; at most {limit} are read (limits.file_bytes)",
            stamp.size
        );
        return Content::Rejected(RejectReason::new(RejectCode::FileTooLarge, message), stamp);
    }
    if stamp.size == 0 {
        return Content::Rejected(
            RejectReason::new(RejectCode::Empty, "the file is empty"),
            stamp,
        );
    }
    let mut bytes = Vec::with_capacity(stamp.size as usize + 1);
    if let Err(error) = (&mut file).take(stamp.size + 1).read_to_end(&mut bytes) {
        return unreadable(&error, stamp);
    }
    match file.metadata() {
        Ok(after) if Stamp::of(&after) == stamp && bytes.len() as u64 == stamp.size => {
            Content::Bytes(bytes, stamp)
        }
        Ok(_) => Content::Changing,
        Err(error) => unreadable(&error, stamp),
    }
}

fn gone(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

fn unreadable(error: &std::io::Error, stamp: Stamp) -> Content {
    // Only a lasting refusal is the file's own; a share that stutters or a lack of descriptors is not.
    let lasting = matches!(
        error.kind(),
        ErrorKind::PermissionDenied | ErrorKind::NotFound | ErrorKind::InvalidFilename
    ) || error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error());
    if !lasting {
        tracing::debug!(kind = %error.kind(), "a file cannot be read now");
        return Content::Trouble(Some(stamp));
    }
    // The kind only: the error's own text may name the file.
    let message = format!("the file cannot be read ({})", error.kind());
    Content::Rejected(RejectReason::new(RejectCode::Unreadable, message), stamp)
}

fn not_a_file(metadata: &Metadata) -> &'static str {
    let kind = metadata.file_type();
    if kind.is_fifo() {
        "a FIFO, not a file"
    } else if kind.is_socket() {
        "a socket, not a file"
    } else if kind.is_dir() {
        "a link to a folder, not a file"
    } else {
        "a device, not a file"
    }
}

/// Whether the opened file lies below `root`: asked of the kernel for the open descriptor, so that nothing can be exchanged in between.
fn inside(root: &Path, path: &Path, file: &File) -> bool {
    std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))
        .or_else(|_| path.canonicalize())
        .is_ok_and(|real| real.starts_with(root))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn code(content: &Content) -> Option<RejectCode> {
        match content {
            Content::Rejected(reason, _) => Some(reason.code),
            _ => None,
        }
    }

    #[test]
    fn only_regular_files_inside_the_folder_are_read() {
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("secret"), b"secret").unwrap();
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().canonicalize().unwrap();
        std::fs::write(root.join("a"), b"hello").unwrap();
        std::fs::write(root.join("empty"), b"").unwrap();
        std::fs::create_dir(root.join("sub")).unwrap();
        symlink("a", root.join("inner")).unwrap();
        symlink(root.join("a"), root.join("sub/absolute")).unwrap();
        symlink(outside.path().join("secret"), root.join("outer")).unwrap();
        symlink(outside.path(), root.join("folder")).unwrap();
        symlink("nowhere", root.join("dangling")).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            root.join("fifo"),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR,
            0,
        )
        .unwrap();
        let read = |name: &str| super::read(&root, Path::new(name), 16);
        for name in ["a", "inner", "sub/absolute"] {
            assert!(
                matches!(read(name), Content::Bytes(bytes, _) if bytes == b"hello"),
                "{name}"
            );
        }
        assert_eq!(code(&read("outer")), Some(RejectCode::OutsideFolder));
        assert_eq!(
            code(&read("folder/secret")),
            Some(RejectCode::OutsideFolder)
        );
        assert_eq!(code(&read("folder")), Some(RejectCode::NotAFile));
        assert_eq!(code(&read("fifo")), Some(RejectCode::NotAFile));
        assert_eq!(code(&read("dangling")), Some(RejectCode::Unreadable));
        assert_eq!(code(&read("empty")), Some(RejectCode::Empty));
        assert!(matches!(read("missing"), Content::Vanished));
        assert_eq!(
            code(&super::read(&root, Path::new("a"), 4)),
            Some(RejectCode::FileTooLarge)
        );
    }
}
