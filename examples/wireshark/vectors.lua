-- The published vectors against tulle_aead.lua; also for a bare interpreter, in this folder: lua vectors.lua
-- In tshark: -X lua_script:vectors.lua. A line for each, and an error at the end if one failed.

local aead = require "tulle_aead"

local function unhex(text)
  return (text:gsub("%s", ""):gsub("%x%x", function(x) return string.char(tonumber(x, 16)) end))
end

local failed = 0
local function report(name, ok)
  if not ok then failed = failed + 1 end
  print((ok and "ok   " or "FAIL ") .. name)
end

local function opens(name, cipher, v)
  for k, text in pairs(v) do v[k] = unhex(text) end
  local open = aead.new[cipher](v.key)
  report(name, open(v.nonce, v.aad, v.text, v.tag, true) == v.plaintext)
  report(name .. ", without its tag", open(v.nonce, v.aad, v.text, "", false) == v.plaintext)
  for _, what in ipairs({ "nonce", "aad", "text", "tag" }) do
    local c = { nonce = v.nonce, aad = v.aad, text = v.text, tag = v.tag }
    if #c[what] > 0 then
      c[what] = c[what]:sub(1, -2) .. string.char((c[what]:byte(-1) + 1) % 256)
      report(name .. ", another " .. what, open(c.nonce, c.aad, c.text, c.tag, true) == nil)
    end
  end
end

opens("RFC 8439, 2.8.2", "chacha20-poly1305", {
  key = "808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9f",
  nonce = "070000004041424344454647",
  aad = "50515253c0c1c2c3c4c5c6c7",
  plaintext = [[4c616469657320616e642047656e746c656d656e206f662074686520636c6173
    73206f66202739393a204966204920636f756c64206f6666657220796f75206f6e6c79206f6e652074697020666f7220746865206675747572
    652c2073756e73637265656e20776f756c642062652069742e]],
  text = [[d31a8d34648e60db7b86afbc53ef7ec2a4aded51296e08fea9e2b5a736ee62d6
    3dbea45e8ca9671282fafb69da92728b1a71de0a9e060b2905d6a5b67ecd3b36
    92ddbd7f2d778b8c9803aee328091b58fab324e4fad675945585808b4831d7bc
    3ff4def08e4b7a9de576d26586cec64b6116]],
  tag = "1ae10b594f09e26a7e902ecbd0600691",
})

local zeros = ("00"):rep(16)
opens("GCM, test case 13", "aes-256-gcm", {
  key = zeros .. zeros, nonce = ("00"):rep(12), aad = "", plaintext = "", text = "", tag = "530f8afbc74536b9a963b4f1c4cb738b",
})
opens("GCM, test case 14", "aes-256-gcm", {
  key = zeros .. zeros, nonce = ("00"):rep(12), aad = "", plaintext = zeros,
  text = "cea7403d4d606b6e074ec5d3baf39d18", tag = "d0d1c8a799996bf0265b98b5d48ab919",
})
opens("GCM, test case 16", "aes-256-gcm", {
  key = "feffe9928665731c6d6a8f9467308308feffe9928665731c6d6a8f9467308308",
  nonce = "cafebabefacedbaddecaf888",
  aad = "feedfacedeadbeeffeedfacedeadbeefabaddad2",
  plaintext = [[d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72
    1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39]],
  text = [[522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa
    8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662]],
  tag = "76fc6ece0f4e1768cddf8853bb2d551b",
})

-- RFC 8439, appendix A.3, from vector 7 on: sums at and around 2^130-5 and 2^128.
local ones = ("ff"):rep(16)
local function number(low) return low .. ("00"):rep(16 - #low / 2) end
for i, v in ipairs({
  { number("02"), zeros, ones, number("03") },
  { number("02"), ones, number("02"), number("03") },
  { number("01"), zeros, ones .. "f0" .. ("ff"):rep(15) .. number("11"), number("05") },
  { number("01"), zeros, ones .. "fb" .. ("fe"):rep(15) .. ("01"):rep(16), zeros },
  { number("02"), zeros, "fd" .. ("ff"):rep(15), "fa" .. ("ff"):rep(15) },
  { number("010000000000000004"), zeros, number("e33594d7505e43b9") .. "3394d7505e4379cd" .. "0100000000000000" .. zeros .. number("01"), number("140000000000000055") },
  { number("010000000000000004"), zeros, number("e33594d7505e43b9") .. "3394d7505e4379cd" .. "0100000000000000" .. zeros, number("13") },
}) do
  report("RFC 8439, A.3, corner " .. i, aead.poly1305(unhex(v[1] .. v[2]), unhex(v[3])) == unhex(v[4]))
end

if failed > 0 then error(failed .. " vectors failed") end
