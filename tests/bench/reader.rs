//! The simulated CRIU of a restore: asks for one file after another and reads each to its end.

use crate::common::criu::{Criu, Role};
use crate::image::Content;
use crate::role;
use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use std::{io::Read, path::Path};

#[derive(Serialize, Deserialize)]
pub struct Reader {
    pub content: Content,
}

impl Reader {
    pub fn play(self) -> Result<()> {
        let files = self.content.files();
        let mut buffer = vec![1; 1 << 20];
        role::perform(|images_dir| {
            let criu = Criu::try_connect(Path::new(images_dir), Role::Serve)?;
            for (name, expected) in &files {
                let mut pipe = (criu.try_open_file(name, None)?)
                    .with_context(|| format!("{name} is not in the image"))?;
                let mut taken = 0;
                loop {
                    match pipe.read(&mut buffer)? {
                        0 => break,
                        bytes => taken += bytes as u64,
                    }
                }
                ensure!(taken == *expected, "{name} has {taken} bytes of {expected}");
            }
            Ok(())
        })
    }
}
