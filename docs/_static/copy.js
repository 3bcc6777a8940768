// A button on every block of code that copies it, without prompts and what a program printed.
document.addEventListener("DOMContentLoaded", () => {
  if (!navigator.clipboard) return;
  for (const block of document.querySelectorAll("div[class*=highlight-]:not(.highlight-text):not(.highlight-none) > .highlight")) {
    const code = block.querySelector("pre");
    if (!code || block.closest(".output, .cell_output, .testoutput")) continue;
    const button = document.createElement("button");
    button.className = "copy";
    button.type = "button";
    button.textContent = "Copy";
    button.addEventListener("click", async () => {
      const lines = code.innerText.split("\n");
      const typed = lines.filter((line) => /^(>>>|\.\.\.|\$)( |$)/.test(line));
      const kept = typed.length && /^(>>>|\$) /.test(lines[0]) ? typed.map((line) => line.replace(/^(>>>|\.\.\.|\$) ?/, "")) : lines;
      await navigator.clipboard.writeText(kept.join("\n").trimEnd() + "\n");
      button.textContent = "Copied";
      setTimeout(() => (button.textContent = "Copy"), 1500);
    });
    block.append(button);
  }
});
