/** Whether a key belongs to an input method that is putting a word together. 229: Safari ends the
 * word before it tells of the key that ended it. */
export const isComposing = (event: KeyboardEvent): boolean =>
  event.isComposing || event.keyCode === 229;
