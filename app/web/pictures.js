/** Where pictures come from: drop, paste, file, camera, and a pad to draw on; and the part of one that the network sees. */

const $ = (id) => document.getElementById(id);

/** Call found(blob, name) for every picture that is given, and say(words) where none can be. */
export function listen(found, say) {
  listenToFiles(found, say);
  listenToClipboard(found, say);
  listenToCamera(found, say);
  listenToPad(found);
}

function listenToFiles(found, say) {
  $("file").addEventListener("change", () => {
    const [file] = $("file").files;
    if (file) found(file, file.name);
    $("file").value = ""; // the same file may be chosen again
  });
  addEventListener("dragover", (event) => {
    event.preventDefault();
    document.body.classList.add("dragging");
  });
  addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dragging");
  });
  addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dragging");
    const { files } = event.dataTransfer;
    if (files.length > 1) say(`${files.length} files were dropped; this page takes one at a time.`);
    else if (files.length) found(files[0], files[0].name);
    else say("What was dropped is no file: save the picture first, and drop it from its folder.");
  });
}

function listenToClipboard(found, say) {
  addEventListener("paste", (event) => {
    const [file] = event.clipboardData.files;
    if (file) found(file, file.name || "pasted.png");
    else if (event.target.tagName !== "INPUT") say("The clipboard holds no picture: copy one first.");
  });
  $("paste").addEventListener("click", async () => {
    if (!navigator.clipboard?.read) return say("This browser gives the clipboard to keys alone: press Ctrl+V, or ⌘V.");
    try {
      for (const item of await navigator.clipboard.read()) {
        const type = item.types.find((one) => one.startsWith("image/"));
        if (type) return found(await item.getType(type), `pasted.${type.slice(6)}`);
      }
      say("The clipboard holds no picture: copy one first.");
    } catch {
      say("The browser did not give the clipboard: allow it, or press Ctrl+V, or ⌘V.");
    }
  });
}

function listenToCamera(found, say) {
  const [dialog, video] = [$("camera-dialog"), $("video")];
  $("camera").addEventListener("click", async () => {
    if (!navigator.mediaDevices) return say("Browsers give the camera to https:// and to localhost alone.");
    try {
      video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
      dialog.showModal();
    } catch (error) {
      say(error.name === "NotAllowedError" ? "The camera was not allowed." : `There is no camera to be had: ${error.message}.`);
    }
  });
  $("shoot").addEventListener("click", async () => {
    const canvas = new OffscreenCanvas(video.videoWidth, video.videoHeight);
    canvas.getContext("2d").drawImage(video, 0, 0);
    found(await canvas.convertToBlob({ type: "image/png" }), "camera.png");
    dialog.close();
  });
  $("no-camera").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => {
    for (const track of video.srcObject.getTracks()) track.stop();
    video.srcObject = null;
  });
}

function listenToPad(found) {
  const pad = $("pad");
  const context = pad.getContext("2d");
  let pen = { x: pad.width / 2, y: pad.height / 4, down: false };
  context.fillRect(0, 0, pad.width, pad.height);
  context.strokeStyle = "#fff";
  context.lineWidth = 30;
  context.lineCap = "round";

  const moveTo = (x, y, draws) => {
    if (draws) {
      context.beginPath();
      context.moveTo(pen.x, pen.y);
      context.lineTo(x, y);
      context.stroke();
    }
    pen = { ...pen, x, y };
  };
  const done = () => pad.toBlob((blob) => found(blob, "drawing.png"));
  const place = (event) => [event.offsetX * pad.width / pad.clientWidth, event.offsetY * pad.height / pad.clientHeight];

  pad.addEventListener("pointerdown", (event) => {
    pad.setPointerCapture(event.pointerId);
    moveTo(...place(event), false);
    moveTo(...place(event), true);
  });
  pad.addEventListener("pointermove", (event) => {
    if (event.buttons & 1) moveTo(...place(event), true);
  });
  pad.addEventListener("pointerup", done);
  pad.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [0, -8], ArrowDown: [0, 8], ArrowLeft: [-8, 0], ArrowRight: [8, 0] }[event.key];
    if (!step && event.key !== " ") return;
    event.preventDefault();
    if (step) return moveTo(pen.x + step[0], pen.y + step[1], pen.down);
    pen.down = !pen.down;
    if (!pen.down) done();
  });
  $("draw").addEventListener("click", () => {
    const opens = $("pad-panel").hidden;
    $("pad-panel").hidden = !opens;
    $("draw").setAttribute("aria-expanded", String(opens));
    if (opens) pad.focus();
  });
  $("clear").addEventListener("click", () => {
    context.fillRect(0, 0, pad.width, pad.height);
    pen = { ...pen, down: false };
  });
}

/** The part of a picture that reaches the network, {x, y, width, height} in pixels, by the image processor's settings. */
export function seenPart(processor, width, height) {
  const sides = (size) => (typeof size === "number" ? [size, size] : [size.height, size.width]);
  let crop = null; // [height, width] of what is cut out, after a resize to `resized`
  let resized = [height, width];
  if (processor.crop_pct) {
    crop = sides(processor.size);
    resized = shortSide(Math.floor(crop[0] / processor.crop_pct), height, width);
  } else {
    const { shortest_edge: edge } = processor.size;
    if (processor.do_resize) resized = edge ? shortSide(edge, height, width) : sides(processor.size);
    if (processor.do_center_crop) crop = sides(processor.crop_size);
  }
  const [down, across] = crop ? [crop[0] / resized[0], crop[1] / resized[1]] : [1, 1];
  return { x: width * (1 - across) / 2, y: height * (1 - down) / 2, width: width * across, height: height * down };
}

const shortSide = (side, height, width) => [side * height / Math.min(height, width), side * width / Math.min(height, width)];
