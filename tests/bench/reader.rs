//! The simulated CRIU of a restore: asks for one file after another and reads each to its end.

use crate::common::criu::{Criu, Role};
use crate::image::Content;
use crate::memory::{PageMemory, Pages};
use crate::role;
use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use std::{io::Read, path::Path};

#[derive(Serialize, Deserialize)]
pub struct Reader {
    pub content: Content,
    /// Into memory of its own that it has not touched before, like a process that is restored;
    /// otherwise over and over into the same.
    pub keeps: bool,
}

impl Reader {
    pub fn play(self) -> Result<()> {
        let files = self.content.files();
        let mut buffer = vec![1; 1 << 20];
        let mut kept = vec![];
        role::perform(|images_dir| {
            let criu = Criu::try_connect(Path::new(images_dir), Role::Serve)?;
            for (name, expected) in &files {
                let mut pipe = (criu.try_open_file(name, None)?)
                    .with_context(|| format!("{name} is not in the image"))?;
                let mut own = match self.keeps {
                    true => Some(PageMemory::fresh(*expected as usize + 1, Pages::Small)?),
                    false => None,
                };
                let mut taken = 0;
                loop {
                    let place = match &mut own {
                        Some(own) => &mut own.as_mut_slice()[taken as usize..],
                        None => &mut buffer,
                    };
                    match pipe.read(place)? {
                        0 => break,
                        bytes => taken += bytes as u64,
                    }
                }
                kept.extend(own);
                ensure!(taken == *expected, "{name} has {taken} bytes of {expected}");
            }
            Ok(())
        })
    }
}
