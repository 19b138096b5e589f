//! Signatures: by key files, or by a command that has the key somewhere safer.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Stdio,
};

use base64::{
    Engine as _, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use fwpush_keys::{Envelope, PublicKey, SigningKey};
use rustix::io::ioctl_fionread;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::unix::pipe,
    process::Command,
};
use zeroize::Zeroizing;

use crate::{
    args::SigningArgs,
    config, disk,
    failure::{Doing as _, Failure, NextStep as _, Result},
    limits,
    output::Output,
};

/// Signs `envelope` as the arguments say, or with the files `default_keys`. Returns the keys that signed.
///
/// `candidates` are the keys that may sign this document: among them the key of a signing command is found.
pub async fn sign(
    envelope: &mut Envelope,
    args: &SigningArgs,
    default_keys: impl FnOnce() -> Result<Vec<PathBuf>>,
    candidates: &[PublicKey],
    out: Output,
) -> Result<Vec<PublicKey>> {
    if let Some(command) = &args.signer {
        let signature = run_signer(command, &envelope.pae()).await?;
        let key = signer_key(
            args.signer_key.as_deref(),
            candidates,
            &envelope.pae(),
            &signature,
        )?;
        envelope
            .add_signature(key, signature)
            .doing(|| "add the signature".to_owned())?;
        return Ok(vec![key]);
    }
    let files = if args.keys.is_empty() {
        default_keys()?
    } else {
        args.keys.clone()
    };
    let mut signers = Vec::new();
    for file in &files {
        let key = read_key(file, out)?;
        envelope
            .sign(&key)
            .doing(|| format!("sign with {}", file.display()))?;
        signers.push(key.public());
    }
    Ok(signers)
}

/// Reads a private key. Says so when others on this machine can read it too. No error repeats any of the file.
pub fn read_key(path: &Path, out: Output) -> Result<SigningKey> {
    let pem = Zeroizing::new(disk::read_text(path)?);
    let key = SigningKey::from_pem(&pem).doing(|| format!("use the key {}", path.display()))?;
    if fs::metadata(path).is_ok_and(|file| file.permissions().mode() & 0o077 != 0) {
        let path = path.display();
        out.say(&format!(
            "warning: others on this machine can read {path}: `chmod 600 {path}`"
        ));
    }
    Ok(key)
}

/// Reads a public key: PEM, or 64 hexadecimal digits. Of a private key's file the public half.
pub fn read_public_key(path: &Path) -> Result<PublicKey> {
    let text = Zeroizing::new(disk::read_text(path)?);
    let text = text.trim();
    let key = if text.starts_with("-----BEGIN PRIVATE KEY-----") {
        SigningKey::from_pem(text).map(|key| key.public())
    } else if text.starts_with("-----") {
        PublicKey::from_pem(text)
    } else {
        PublicKey::from_hex(text)
    };
    key.doing(|| format!("use the public key {}", path.display()))
}

/// The offline files that sign releases when no other is named: each `offline/release-*.key` whose public half is among
/// `candidates`, sorted by name. Where nothing is known of candidates, `release-1.key`.
pub fn default_release_keys(dir: Option<&Path>, candidates: &[PublicKey]) -> Result<Vec<PathBuf>> {
    let name_one =
        || "Name the release key with --key FILE, or a signing command with --signer.".to_owned();
    let offline = config::need_offline_dir(dir).next_step(name_one)?;
    let mut files = disk::files_named(&offline, "release-", ".key")?;
    if candidates.is_empty() {
        files.retain(|file| file.ends_with("release-1.key"));
    } else {
        files.retain(|file| read_public_key(file).is_ok_and(|key| candidates.contains(&key)));
    }
    if files.is_empty() {
        let offline = offline.display();
        return Err(Failure::usage(format!(
            "there is no release key in {offline} that the root lists for this"
        )))
        .next_step(name_one);
    }
    Ok(files)
}

fn signer_key(
    named: Option<&Path>,
    candidates: &[PublicKey],
    message: &[u8],
    signature: &[u8; 64],
) -> Result<PublicKey> {
    if let Some(path) = named {
        let key = read_public_key(path)?;
        if !key.verify(message, signature) {
            return Err(Failure::new(format!(
                "the signing command's answer is no signature by the key {}",
                path.display()
            ))
            .next(
                "Does it sign the bytes as they are (Ed25519, not Ed25519ph or a hash of them)?",
            ));
        }
        return Ok(key);
    }
    candidates.iter().copied().find(|key| key.verify(message, signature)).ok_or_else(|| {
        Failure::new("the signing command's answer is no signature by any key that the root lists for this")
            .next("Name the public key with --signer-key FILE. A new key counts once `fwpush keys rotate-root` listed it.")
    })
}

/// Runs the signing command with `message` on its standard input. Its words go to our stderr, so that it can ask for a
/// PIN. The command line may hold one: it is repeated nowhere.
async fn run_signer(command: &str, message: &[u8]) -> Result<[u8; 64]> {
    let starting = || "start the signing command".to_owned();
    let (reader, writer) = std::io::pipe().doing(starting)?;
    // Our own end for reading: it tells what was left unread.
    let left = reader.try_clone().doing(starting)?;
    let mut child = Command::new("sh")
        .args(["-c", command])
        .stdin(reader)
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .doing(starting)?;
    let stdout = child.stdout.take();
    let mut stdin = pipe::Sender::from_owned_fd(writer.into()).doing(starting)?;
    let read = async {
        let mut answer = Vec::new();
        if let Some(stdout) = stdout {
            stdout
                .take(limits::SIGNER_ANSWER_BYTES + 1)
                .read_to_end(&mut answer)
                .await?;
        }
        Ok::<_, std::io::Error>(answer)
    };
    let finish = async {
        // Ends the message when it is written, or when nobody is left to read it.
        let mut written = 0;
        let status = tokio::select! {
            status = child.wait() => status?,
            done = write(&mut stdin, message, &mut written) => {
                done?;
                drop(stdin);
                child.wait().await?
            }
        };
        let unread = message.len() as u64 - written as u64 + ioctl_fionread(&left)?;
        Ok::<_, std::io::Error>((status, unread))
    };
    let work = async {
        let (finished, answer) = tokio::join!(finish, read);
        let (status, unread) = finished?;
        Ok::<_, std::io::Error>((answer?, status, unread))
    };
    let (answer, status, unread) = tokio::time::timeout(limits::SIGNER_TIME, work)
        .await
        .map_err(|_| {
            Failure::new(format!(
                "the signing command took over {} s",
                limits::SIGNER_TIME.as_secs()
            ))
            .next("It must end once it has printed the signature; it may ask for a PIN on the terminal.")
        })?
        .doing(|| "talk to the signing command".to_owned())?;
    if answer.len() as u64 > limits::SIGNER_ANSWER_BYTES {
        return Err(Failure::new(format!(
            "the signing command printed more than {} bytes",
            limits::SIGNER_ANSWER_BYTES
        ))
        .next(A_SIGNATURE));
    }
    let left = match unread {
        0 => String::new(),
        _ => format!(
            " and left {unread} of the {} bytes that it has to sign unread",
            message.len()
        ),
    };
    if !status.success() {
        return Err(
            Failure::new(format!("the signing command failed ({status}){left}"))
                .next("What it said stands above."),
        );
    }
    if unread > 0 {
        return Err(Failure::new(format!("the signing command ended{left}"))
            .next("It gets these bytes on its standard input, and must read all of them."));
    }
    parse_signature(&answer).ok_or_else(|| {
        Failure::new(format!(
            "the signing command printed {} bytes that are no signature",
            answer.len()
        ))
        .next(A_SIGNATURE)
    })
}

const A_SIGNATURE: &str = "It must print the 64 bytes of an Ed25519 signature, raw or as hex or base64, and nothing else.";

async fn write(to: &mut pipe::Sender, message: &[u8], written: &mut usize) -> std::io::Result<()> {
    while *written < message.len() {
        *written += to.write(&message[*written..]).await?;
    }
    Ok(())
}

/// 64 bytes as they are, or as hex or base64 (both alphabets, with or without padding) with any white space.
fn parse_signature(answer: &[u8]) -> Option<[u8; 64]> {
    if let Ok(raw) = answer.try_into() {
        return Some(raw);
    }
    const EITHER_PADDING: GeneralPurposeConfig =
        GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    // Tools break lines after 64 or 76 characters.
    let text: String = std::str::from_utf8(answer)
        .ok()?
        .split_ascii_whitespace()
        .collect();
    let alphabet = if text.contains(['-', '_']) {
        &alphabet::URL_SAFE
    } else {
        &alphabet::STANDARD
    };
    hex::decode(&text)
        .or_else(|_| GeneralPurpose::new(alphabet, EITHER_PADDING).decode(text))
        .ok()?
        .try_into()
        .ok()
}

#[cfg(test)]
mod tests {
    use fwpush_keys::PayloadType;

    use super::*;

    const QUIET: Output = Output { json: false };

    fn envelope() -> Envelope {
        Envelope::new(PayloadType::Release, b"{}".to_vec())
    }

    /// A signing command with the right answer for `envelope` in the given form.
    fn signer(key: &SigningKey, form: impl Fn(&[u8]) -> String) -> SigningArgs {
        let signature = key.sign(&envelope().pae());
        let command = format!("cat >/dev/null; printf '%s\\n' '{}'", form(&signature));
        SigningArgs {
            signer: Some(command),
            ..SigningArgs::default()
        }
    }

    async fn sign_with(args: &SigningArgs, candidates: &[PublicKey]) -> Result<Vec<PublicKey>> {
        sign(&mut envelope(), args, || Ok(Vec::new()), candidates, QUIET).await
    }

    #[tokio::test]
    async fn a_signing_command_may_answer_in_any_usual_form() {
        let key = SigningKey::generate();
        let others = [SigningKey::generate().public(), key.public()];
        let standard = GeneralPurpose::new(&alphabet::STANDARD, GeneralPurposeConfig::new());
        let url_safe = GeneralPurpose::new(
            &alphabet::URL_SAFE,
            GeneralPurposeConfig::new().with_encode_padding(false),
        );
        for args in [
            signer(&key, |s| hex::encode(s)),
            signer(&key, |s| standard.encode(s)),
            signer(&key, |s| url_safe.encode(s)),
        ] {
            assert_eq!(sign_with(&args, &others).await.unwrap(), [key.public()]);
        }
        assert_eq!(parse_signature(&[7; 64]), Some([7; 64]), "raw");
        let (head, tail) = ("07".repeat(40), "07".repeat(24));
        assert_eq!(
            parse_signature(format!("{head}\n{tail}\n").as_bytes()),
            Some([7; 64]),
            "in lines"
        );
        assert_eq!(parse_signature(&[7; 63]), None);
    }

    #[tokio::test]
    async fn a_signing_command_gets_the_exact_bytes_to_sign() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("seen");
        let command = format!("cat > {}; exit 3", path.display());
        let args = SigningArgs {
            signer: Some(command),
            ..SigningArgs::default()
        };
        let failure = sign_with(&args, &[]).await.unwrap_err();
        assert!(failure.to_string().contains("exit status: 3"), "{failure}");
        assert_eq!(fs::read(path).unwrap(), envelope().pae());
    }

    #[tokio::test]
    async fn a_signature_of_a_foreign_key_is_refused_at_once() {
        let key = SigningKey::generate();
        let args = signer(&key, |s| hex::encode(s));
        assert!(
            sign_with(&args, &[SigningKey::generate().public()])
                .await
                .is_err()
        );
    }

    #[tokio::test]
    async fn an_error_never_repeats_the_command_line() {
        let args = SigningArgs {
            signer: Some("exit 1 # pin 123456".to_owned()),
            ..SigningArgs::default()
        };
        let failure = sign_with(&args, &[]).await.unwrap_err();
        let mut words = Vec::new();
        failure.report(&mut words).unwrap();
        assert!(!String::from_utf8(words).unwrap().contains("123456"));
    }

    #[tokio::test]
    async fn a_key_file_signs_and_an_unreadable_one_is_named_without_its_content() {
        let dir = tempfile::tempdir().unwrap();
        let (good, bad) = (dir.path().join("good.key"), dir.path().join("bad.key"));
        let key = SigningKey::generate();
        disk::write_new(&good, key.to_pkcs8_v1_pem().as_bytes()).unwrap();
        disk::write_new(
            &bad,
            b"-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n",
        )
        .unwrap();
        let with = |file| SigningArgs {
            keys: vec![file],
            ..SigningArgs::default()
        };
        assert_eq!(sign_with(&with(good), &[]).await.unwrap(), [key.public()]);
        let failure = sign_with(&with(bad), &[]).await.unwrap_err().to_string();
        assert!(
            failure.contains("bad.key") && !failure.contains("c2VjcmV0"),
            "{failure}"
        );
    }

    #[test]
    fn without_a_named_key_those_sign_that_the_root_lists() {
        let dir = tempfile::tempdir().unwrap();
        let offline = dir.path().join("offline");
        fs::create_dir(&offline).unwrap();
        let keys = ["release-1.key", "release-2.key", "root-1.key"].map(|name| {
            let key = SigningKey::generate();
            disk::write_new(&offline.join(name), key.to_pkcs8_v1_pem().as_bytes()).unwrap();
            key
        });
        let files = |candidates: &[PublicKey]| default_release_keys(Some(dir.path()), candidates);
        assert_eq!(files(&[]).unwrap(), [offline.join("release-1.key")]);
        assert_eq!(
            files(&[keys[1].public()]).unwrap(),
            [offline.join("release-2.key")]
        );
        assert_eq!(
            files(&[keys[0].public(), keys[1].public()]).unwrap().len(),
            2
        );
        assert!(files(&[SigningKey::generate().public()]).is_err());
    }

    #[tokio::test]
    async fn what_a_signing_command_did_wrong_is_said() {
        let message = vec![7; 2_000];
        for (command, why) in [
            ("exit 0", "ended and left 2000 of the 2000 bytes"),
            (
                "exit 3",
                "failed (exit status: 3) and left 2000 of the 2000",
            ),
            ("cat > /dev/null; exit 3", "failed (exit status: 3)"),
            ("cat > /dev/null", "printed 0 bytes that are no signature"),
            (
                "cat > /dev/null; head -c 1000000 /dev/zero",
                "printed more than",
            ),
            ("kill -9 $$", "SIGKILL"),
        ] {
            let failure = run_signer(command, &message).await.unwrap_err();
            assert!(failure.to_string().contains(why), "{command}: {failure}");
            let mut shown = Vec::new();
            failure.report(&mut shown).unwrap();
            let shown = String::from_utf8(shown).unwrap();
            assert!(shown.contains(" next: "), "{command}: {shown}");
        }
        let read_all = run_signer("cat > /dev/null; head -c 64 /dev/zero", &message).await;
        assert_eq!(read_all.unwrap(), [0; 64]);
    }

    #[tokio::test]
    async fn a_message_that_no_pipe_holds_is_handed_over_whole_or_its_rest_is_counted() {
        let message = vec![7; 1 << 20];
        let read_all = run_signer("cat > /dev/null; head -c 64 /dev/zero", &message).await;
        assert_eq!(read_all.unwrap(), [0; 64]);
        let failure = run_signer("head -c 1000 > /dev/null", &message).await;
        let failure = failure.unwrap_err().to_string();
        assert!(failure.contains("of the 1048576 bytes"), "{failure}");
    }
}
