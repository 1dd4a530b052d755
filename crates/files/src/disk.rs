//! Room on a disk.

use std::path::{Path, PathBuf};

/// Bytes that this user may still write on the disk that holds `place`, which need not be there yet; `None` where the system does not
/// say.
#[cfg(unix)]
pub fn disk_free(place: &Path) -> Option<u64> {
    let disk = rustix::fs::statvfs(nearest(place)?).ok()?;
    disk.f_bavail.checked_mul(disk.f_frsize)
}

/// Bytes that this user may still write on the disk that holds `place`, which need not be there yet; `None` where the system does not
/// say.
#[cfg(not(unix))]
pub fn disk_free(place: &Path) -> Option<u64> {
    // Both as Windows spells a path that it was asked for: drives are mount points.
    let place = nearest(place)?.canonicalize().ok()?;
    let disks = sysinfo::Disks::new_with_refreshed_list();
    let mount_point = |disk: &sysinfo::Disk| {
        let path = disk.mount_point();
        path.canonicalize().unwrap_or_else(|_| path.to_owned())
    };
    disks
        .iter()
        .map(|disk| (mount_point(disk), disk.available_space()))
        .filter(|(mount_point, _)| place.starts_with(mount_point))
        .max_by_key(|(mount_point, _)| mount_point.as_os_str().len())
        .map(|(_, free)| free)
}

/// The nearest folder above `place`, or `place` itself, that is there.
fn nearest(place: &Path) -> Option<PathBuf> {
    let place = std::path::absolute(place).ok()?;
    let mut there = place.ancestors().filter(|above| above.exists());
    there.next().map(Path::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_room_is_that_of_the_folder_in_which_a_place_will_be() {
        let dir = tempfile::tempdir().unwrap();
        let free = disk_free(dir.path()).unwrap();
        assert!(free > 0);
        // Others write meanwhile: the same disk, not the same number.
        assert!(disk_free(&dir.path().join("not/there/yet")).unwrap() > free / 2);
    }
}
