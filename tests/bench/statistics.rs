//! Figures from several runs.

/// As in "GB/s".
pub const GB: f64 = 1e9;

/// The median of peaks of memory, over an image's size; none where one of them is not known.
pub fn over_image_mib(peaks: impl Iterator<Item = Option<u64>>, image: u64) -> Option<f64> {
    let peaks: Option<Vec<u64>> = peaks.collect();
    let median = median_of(peaks?.into_iter().map(|bytes| bytes as f64));
    Some((median - image as f64) / f64::from(1 << 20))
}

pub fn median_of(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<_> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 {
        values[middle]
    } else {
        (values[middle - 1] + values[middle]) / 2.0
    }
}
