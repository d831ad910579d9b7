/** Sources of images (drop, paste, file, camera and drawing pad), and the part of an image that the network receives. */

const $ = (id) => document.getElementById(id);
const NO_IMAGE_IN_CLIPBOARD = "The clipboard contains no image: copy one first.";

/** Call onImage(blob, name) for every image that the user provides, and onError(message) if that fails. */
export function listen(onImage, onError) {
  listenToFiles(onImage, onError);
  listenToClipboard(onImage, onError);
  listenToCamera(onImage, onError);
  listenToPad(onImage);
}

function listenToFiles(onImage, onError) {
  $("file").addEventListener("change", () => {
    const [file] = $("file").files;
    if (file) onImage(file, file.name);
    $("file").value = ""; // so that the same file can be chosen again
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
    if (files.length > 1) onError(`${files.length} files were dropped: drop one at a time.`);
    else if (files.length) onImage(files[0], files[0].name);
    else onError("No file was dropped: save the image first, then drop the file.");
  });
}

function listenToClipboard(onImage, onError) {
  addEventListener("paste", (event) => {
    const [file] = event.clipboardData.files;
    if (file) onImage(file, file.name || "pasted.png");
    else if (event.target.tagName !== "INPUT") onError(NO_IMAGE_IN_CLIPBOARD);
  });
  $("paste").addEventListener("click", async () => {
    if (!navigator.clipboard?.read) return onError("This browser only pastes by keyboard: press Ctrl+V or ⌘V.");
    try {
      for (const item of await navigator.clipboard.read()) {
        const type = item.types.find((name) => name.startsWith("image/"));
        if (type) return onImage(await item.getType(type), `pasted.${type.slice(6)}`);
      }
      onError(NO_IMAGE_IN_CLIPBOARD);
    } catch {
      onError("The browser denied access to the clipboard: allow it, or press Ctrl+V or ⌘V.");
    }
  });
}

function listenToCamera(onImage, onError) {
  const [dialog, video] = [$("camera-dialog"), $("video")];
  $("camera").addEventListener("click", async () => {
    if (!navigator.mediaDevices) return onError("Browsers only allow the camera on https:// and localhost.");
    try {
      video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
      dialog.showModal();
    } catch (error) {
      const denied = error.name === "NotAllowedError";
      onError(denied ? "Access to the camera was denied." : `The camera is not available: ${error.message}.`);
    }
  });
  $("capture").addEventListener("click", async () => {
    const canvas = new OffscreenCanvas(video.videoWidth, video.videoHeight);
    canvas.getContext("2d").drawImage(video, 0, 0);
    onImage(await canvas.convertToBlob({ type: "image/png" }), "camera.png");
    dialog.close();
  });
  $("close-camera").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => {
    for (const track of video.srcObject.getTracks()) track.stop();
    video.srcObject = null;
  });
}

function listenToPad(onImage) {
  const pad = $("pad");
  const context = pad.getContext("2d");
  let pen = { x: pad.width / 2, y: pad.height / 4, down: false };
  context.fillRect(0, 0, pad.width, pad.height);
  context.strokeStyle = "#fff";
  context.lineWidth = 30;
  context.lineCap = "round";

  const movePen = (x, y, draw) => {
    if (draw) {
      context.beginPath();
      context.moveTo(pen.x, pen.y);
      context.lineTo(x, y);
      context.stroke();
    }
    pen = { ...pen, x, y };
  };
  const finish = () => pad.toBlob((blob) => onImage(blob, "drawing.png"));
  const position = (event) => [event.offsetX * pad.width / pad.clientWidth, event.offsetY * pad.height / pad.clientHeight];

  pad.addEventListener("pointerdown", (event) => {
    pad.setPointerCapture(event.pointerId);
    movePen(...position(event), false);
    movePen(...position(event), true);
  });
  pad.addEventListener("pointermove", (event) => {
    if (event.buttons & 1) movePen(...position(event), true);
  });
  pad.addEventListener("pointerup", finish);
  pad.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [0, -8], ArrowDown: [0, 8], ArrowLeft: [-8, 0], ArrowRight: [8, 0] }[event.key];
    if (!step && event.key !== " ") return;
    event.preventDefault();
    if (step) return movePen(pen.x + step[0], pen.y + step[1], pen.down);
    pen.down = !pen.down;
    if (!pen.down) finish();
  });
  $("draw").addEventListener("click", () => {
    const open = $("pad-panel").hidden;
    $("pad-panel").hidden = !open;
    $("draw").setAttribute("aria-expanded", String(open));
    if (open) pad.focus();
  });
  $("clear").addEventListener("click", () => {
    context.fillRect(0, 0, pad.width, pad.height);
    pen = { ...pen, down: false };
  });
}

/** Return the region of an image that the network receives under these settings, {x, y, width, height} in pixels. */
export function visibleRegion(processor, width, height) {
  const sides = (size) => (typeof size === "number" ? [size, size] : [size.height, size.width]);
  let crop = null; // [height, width] of the center crop after the resize to `resized`
  let resized = [height, width];
  if (processor.crop_pct) {
    crop = sides(processor.size);
    resized = resizedTo(Math.floor(crop[0] / processor.crop_pct), height, width);
  } else {
    const { shortest_edge: edge } = processor.size;
    if (processor.do_resize) resized = edge ? resizedTo(edge, height, width) : sides(processor.size);
    if (processor.do_center_crop) crop = sides(processor.crop_size);
  }
  const [down, across] = crop ? [crop[0] / resized[0], crop[1] / resized[1]] : [1, 1];
  return { x: width * (1 - across) / 2, y: height * (1 - down) / 2, width: width * across, height: height * down };
}

const resizedTo = (shortEdge, height, width) =>
  [shortEdge * height / Math.min(height, width), shortEdge * width / Math.min(height, width)];
